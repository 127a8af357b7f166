"""Accuracy over all images, each counted once for any number of processes."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ViT_imagenet.config import Config
from ViT_imagenet.data import ImageData
from ViT_imagenet.loader import BadImages, EvalBatches, Sample, eval_transform, make_loader


def test_loader(config: Config, accelerator: Accelerator, data: ImageData, size: int) -> DataLoader[Sample]:
    """This process's share of the evaluation images."""
    batches = EvalBatches(len(data.test), config.batch_size, accelerator.process_index, accelerator.num_processes)
    pin = accelerator.device.type == "cuda"
    return make_loader(data.test, batches, eval_transform(config, size), size, config, pin_memory=pin)


@torch.inference_mode()
def evaluate(
    model: nn.Module, loader: DataLoader[Sample], accelerator: Accelerator, bad_images: BadImages
) -> dict[str, float]:
    """Accuracy and loss over all images of all processes' loaders, each counted once.

    Args:
        model: not wrapped for several processes: their batches differ in number.
        loader: this process's share of the images.
        accelerator: for the device, autocast, and the sum over processes.
        bad_images: takes note of the undecodable, which are not counted.

    Returns:
        test_accuracy, test_top5 (fractions), test_loss (mean cross-entropy), test_images (how many were counted).
    """
    model.eval()
    sums = torch.zeros(4, device=accelerator.device)  # correct, correct in 5, loss, images
    for batch in tqdm(loader, "evaluation", disable=not accelerator.is_main_process, leave=False):
        bad_images.add(batch.bad)
        keep = batch.usable
        images = batch.image[keep].to(accelerator.device, non_blocking=True)
        labels = batch.label[keep].to(accelerator.device, non_blocking=True)
        if len(labels) == 0:
            continue
        with accelerator.autocast():
            logits = model(images).float()  # (B, C)
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)  # (B, 5)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([ranked[:, 0].sum(), ranked.sum(), loss, loss.new_tensor(len(labels))])
    correct, top5, loss_sum, images_seen = accelerator.reduce(sums, reduction="sum").tolist()
    count = max(images_seen, 1.0)
    return {
        "test_accuracy": correct / count,
        "test_top5": top5 / count,
        "test_loss": loss_sum / count,
        "test_images": int(images_seen),
    }
