"""Checkpoints with a damaged byte, and 200 mutated inputs of every kind a run reads."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gnn.config import Config as GraphConfig
from gnn.data import SOURCES, as_graph, load_graph
from gnn.pyg import Data
from repro.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from repro.config import parse_config, to_yaml
from repro.errors import UserError

PER_KIND = 50
HANG_SECONDS = 30


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def planted(trap: Path, choose: random.Random) -> bytes:
    """A pickle that would make `trap`."""
    return pickle.dumps(Bomb(trap), protocol=choose.choice((0, 2, 4)))


def mutated(data: bytes, trap: Path, choose: random.Random) -> bytes:
    """One byte string after one accident, or one attack."""
    kind = choose.choice(("flip", "flip", "cut", "zeros", "double", "swap", "pickle", "empty", "huge"))
    at = choose.randrange(len(data))
    if kind == "flip":
        flipped = bytearray(data)
        for _ in range(choose.choice((1, 1, 8))):
            flipped[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        return bytes(flipped)
    if kind == "swap":
        middle = len(data) // 2
        return data[middle:] + data[:middle]
    return {
        "cut": data[:at], "zeros": data[:at] + bytes(len(data) - at), "double": data + data,
        "pickle": planted(trap, choose), "empty": b"", "huge": data[:at] + b"9" * 400 + data[at:],
    }[kind]  # fmt: skip


class Trials:
    """Runs readers over mutated inputs; anything but acceptance or one clear line fails the test."""

    def __init__(self, tmp_path: Path, alarm: Callable[[int], None]) -> None:
        self.trap = tmp_path / "executed"
        self.outcomes: Counter[str] = Counter()
        self._alarm = alarm

    def read(self, reader: Callable[[], object]) -> None:
        self._alarm(HANG_SECONDS)
        try:
            reader()
        except UserError as error:
            assert str(error) and "\n" not in str(error) and "Traceback" not in str(error)
            self.outcomes["refused in one line"] += 1
        else:
            self.outcomes["still valid, read"] += 1
        self._alarm(0)
        assert not self.trap.exists(), "code from an input was executed"


@pytest.fixture
def trials(tmp_path: Path, alarm: Callable[[int], None]) -> Trials:
    return Trials(tmp_path, alarm)


def note(figures: dict[str, Any], kind: str, trials: Trials) -> None:
    figures.setdefault("mutated_inputs", {})[kind] = dict(trials.outcomes) | {"inputs": trials.outcomes.total()}


def test_damage_at_every_byte_offset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], figures: dict[str, Any]
) -> None:
    state = {"weight": torch.arange(6.0), "epoch": 3, "note": "ünïcode"}
    older = save_checkpoint(tmp_path, 1, {"weight": torch.zeros(6), "epoch": 1, "note": ""})
    newer = save_checkpoint(tmp_path, 2, state)
    offsets = noticed = 0
    for path in sorted(newer.iterdir()):
        whole = path.read_bytes()
        for at in range(len(whole)):
            for damaged in (whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :], whole[:at]):
                path.write_bytes(damaged)
                offsets += 1
                with pytest.raises(ValueError, match="step-0000000002"):
                    read_checkpoint(newer)
                noticed += 1
            if at % 50 == 0:
                found = load_checkpoint(tmp_path)
                assert found is not None and found[0] == 1
                assert "damaged checkpoint skipped" in capsys.readouterr().err
        path.write_bytes(whole)
    assert load_checkpoint(tmp_path)[1]["note"] == "ünïcode"  # type: ignore[index]
    shutil.rmtree(newer)
    (older / "state.json").unlink()
    assert load_checkpoint(tmp_path) is None
    figures["checkpoint_damage"] = {"damages": offsets, "noticed": noticed, "bytes": offsets // 2}


def test_mutated_checkpoints(tmp_path: Path, trials: Trials, tiny: Any, figures: dict[str, Any]) -> None:
    """The newer one damaged: the run falls back and ends with the undisturbed numbers; both damaged: it starts over."""
    choose = random.Random(1)
    tiny.experiment(tiny.Config(str(tmp_path / "calm"), steps=3))
    calm = tiny.comparable(tmp_path / "calm")
    stopped = tmp_path / "stopped"
    config = tiny.Config(str(stopped), steps=3)
    shutil.copytree(tmp_path / "calm", stopped)
    (stopped / "record.json").unlink()
    with pytest.MonkeyPatch.context() as patch:  # a run that dies when it writes its record
        patch.setattr("repro.run.run.Run.finish", lambda *args, **settings: (_ for _ in ()).throw(UserError("stop")))
        with pytest.raises(UserError, match="stop"):
            tiny.experiment(config)
    for number in range(PER_KIND):
        folder = tmp_path / f"{number}"
        shutil.copytree(stopped, folder)
        places = sorted((folder / "checkpoints").glob("step-*"))
        assert len(places) == 2
        for place in places if number % 5 == 0 else places[-1:]:
            path = choose.choice(sorted(place.iterdir()))
            path.write_bytes(mutated(path.read_bytes(), trials.trap, choose))
        trials.read(lambda folder=folder: tiny.experiment(tiny.Config(str(folder), steps=3)))  # type: ignore[misc]
        assert tiny.comparable(folder) == calm
        shutil.rmtree(folder)
    assert trials.outcomes == {"still valid, read": PER_KIND}
    trials.outcomes = Counter({"runs ended with the undisturbed record": PER_KIND})
    note(figures, "checkpoints", trials)


def test_mutated_config_files(tmp_path: Path, trials: Trials, figures: dict[str, Any]) -> None:
    choose = random.Random(2)
    good = to_yaml(GraphConfig(output_dir=str(tmp_path / "run"), norm_mode="CN", scale=1.0))
    lines = good.splitlines()
    config = tmp_path / "config.yaml"
    for number in range(PER_KIND):
        if number % 5 == 0:  # a value of the wrong kind, huge, or that would run code
            place = choose.randrange(len(lines))
            value = choose.choice([
                "1e999", "-1", "9" * 5000, ".nan", "[1, 2]", "{a: b}", "null", "&a [*a]", "'\\0'", "2024-01-01",
                f"!!python/object/apply:os.mknod ['{trials.trap}']", f"!!python/object/new:os.mknod ['{trials.trap}']",
            ])  # fmt: skip
            text = "\n".join([*lines[:place], f"{lines[place].split(':')[0]}: {value}", *lines[place + 1 :]])
            config.write_text(text)
        elif number % 5 == 1:  # two values swapped
            a, b = choose.sample(range(len(lines)), 2)
            keys, values = zip(*(line.split(":", 1) for line in (lines[a], lines[b])), strict=True)
            rest = [line for i, line in enumerate(lines) if i not in (a, b)]
            config.write_text("\n".join([*rest, f"{keys[0]}:{values[1]}", f"{keys[1]}:{values[0]}"]))
        else:
            config.write_bytes(mutated(good.encode(), trials.trap, choose))
        trials.read(lambda: parse_config(GraphConfig, ["--config", str(config), "--output_dir", "x"], prog="gnn.main"))
    note(figures, "config files", trials)


def test_mutated_graph_files(data_root: Path, tmp_path: Path, trials: Trials, figures: dict[str, Any]) -> None:
    """Raw files, Planetoid's pickles among them: a changed one is never opened by anything that executes."""
    choose = random.Random(3)
    names = ["cora", "texas", "cornell", "wisconsin"]
    for number in range(PER_KIND):
        source = SOURCES[names[number % len(names)]]
        raw = Path("graphs") / source.root / source.raw
        root = tmp_path / f"{number}"
        shutil.copytree(data_root / raw, root / raw)
        path = choose.choice(sorted(p for p in (root / raw).iterdir() if p.is_file() and p.stat().st_size))
        path.chmod(0o644)
        before = path.read_bytes()
        path.write_bytes(mutated(before, trials.trap, choose))
        changed = path.read_bytes() != before
        refused = trials.outcomes["refused in one line"]
        trials.read(lambda number=number, root=root: load_graph(names[number % len(names)], root))  # type: ignore[misc]
        assert not changed or trials.outcomes["refused in one line"] == refused + 1, f"{path.name} was read"
        shutil.rmtree(root)
    note(figures, "raw graph files", trials)


def graph(**changes: Any) -> Data:
    """A sound graph of 30 nodes, with changes."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.arange(30) % 3
    parts = {
        "x": torch.rand(30, 4, generator=generator), "y": torch.arange(30) % 3,
        "edge_index": torch.randint(0, 30, (2, 60), generator=generator),
        "train_mask": masks == 0, "val_mask": masks == 1, "test_mask": masks == 2,
    }  # fmt: skip
    return Data(**parts | changes)


SOUND = graph()
BROKEN_GRAPHS = {
    "features not a number": {"x": torch.full((30, 4), torch.nan)},
    "features infinite": {"x": torch.full((30, 4), torch.inf)},
    "an edge too far": {"edge_index": torch.tensor([[0], [30]])},
    "an edge below zero": {"edge_index": torch.tensor([[-1], [3]])},
    "huge node numbers": {"edge_index": torch.tensor([[2**62], [0]])},
    "edges in rows": {"edge_index": SOUND.edge_index.T.contiguous()},
    "edges as fractions": {"edge_index": SOUND.edge_index + 0.5},
    "labels missing": {"y": SOUND.y[:-1]},
    "labels below zero": {"y": SOUND.y - 1},
    "labels as fractions": {"y": SOUND.y + 0.5},
    "labels in columns": {"y": torch.eye(3)[SOUND.y]},
    "features and labels swapped": {"x": SOUND.y, "y": SOUND.x},
    "overlapping sets": {"val_mask": SOUND.train_mask},
    "an empty set": {"test_mask": torch.zeros(30, dtype=torch.bool)},
    "a set too short": {"train_mask": SOUND.train_mask[:-1]},
    "huge labels": {"y": SOUND.y + 2**40},
}


@pytest.mark.parametrize("name", BROKEN_GRAPHS)
def test_a_graph_that_makes_no_sense(name: str, trials: Trials) -> None:
    trials.read(lambda: as_graph("made up", graph(**BROKEN_GRAPHS[name])))
    assert trials.outcomes["refused in one line"] == 1


def test_mutated_parquet_files(tmp_path: Path, trials: Trials, figures: dict[str, Any]) -> None:
    """Image files: bytes mutated, columns swapped, of other types, labels out of range."""
    datasets = pytest.importorskip("datasets", reason="the image reader is the datasets library's")
    from PIL import Image

    from repro.images.data import BadImageError, Parquet

    datasets.config.HF_DATASETS_CACHE = tmp_path / "cache"
    datasets.disable_progress_bars()
    choose = random.Random(4)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    (tmp_path / "picture.png").touch()
    images = []
    for picture in pixels:
        Image.fromarray(picture).save(tmp_path / "picture.png")
        images.append({"bytes": (tmp_path / "picture.png").read_bytes(), "path": None})
    kinds = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    good = tmp_path / "good.parquet"
    datasets.Dataset.from_dict({"img": images, "label": [0, 1] * 3}, features=kinds).to_parquet(str(good))

    def columns(features: Any = None, **values: Any) -> None:
        datasets.Dataset.from_dict(values, features=features).to_parquet(str(path))

    def read() -> None:
        table = Parquet([path])
        for index in range(len(table)):
            try:
                table[index]
            except BadImageError as error:
                raise UserError(str(error)) from error

    for number in range(PER_KIND):
        path = tmp_path / f"{number}.parquet"
        if number < 8:
            changed: list[dict[str, Any]] = [
                {"img": [0, 1] * 3, "label": images},
                {"img": [0.5] * 6, "label": [0, 1] * 3},
                {"label": [0, 1] * 3},
                {"img": images},
                {"img": images, "label": ["a", "b"] * 3},
                {"img": [{"bytes": planted(trials.trap, choose), "path": None}] * 6, "label": [0, 1] * 3,
                 "features": kinds},
                {"img": [{"bytes": None, "path": "/etc/hostname"}] * 6, "label": [0, 1] * 3, "features": kinds},
                {"img": images, "label": [2**40] * 6},
            ]  # fmt: skip
            columns(**changed[number])
        else:
            path.write_bytes(mutated(good.read_bytes(), trials.trap, choose))
        trials.read(read)
    note(figures, "parquet files", trials)


def test_figures_add_up(figures: dict[str, Any]) -> None:
    """The 200 inputs, when all kinds ran."""
    kinds = figures.get("mutated_inputs", {})
    if len(kinds) < 4:
        pytest.skip(f"only {sorted(kinds)} ran in this process")
    assert sum(kind["inputs"] for kind in kinds.values()) == 4 * PER_KIND
    assert json.dumps(kinds)
