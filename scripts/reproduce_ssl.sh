#!/usr/bin/env bash
# Self-supervised learning: every method against its base, then tables, figures and what became of each claim.
#   bash scripts/reproduce_ssl.sh                                   small networks on 10,000 images: two cores, 3 hours
#   PARTS="rdm tokens" SEEDS="0 1" bash scripts/reproduce_ssl.sh    a part of it
#   PRESET=paper bash scripts/reproduce_ssl.sh --dry-run            the published sizes: published accuracy and GPU hours
# Parts: rdm (RDM, SimSiam, BYOL), attn (SimCLR-Attn), arcl (ArCL), multi (SimSiam-Multi), tokens (k-means and TCAS),
# mim (MAE, ClusterMIM; needs tokens), ar (AR, DAR, masked; needs tokens). Arguments go to repro.sweep; re-running the
# command resumes. RECORDS names finished records, one file for each part (rdm/records.jsonl, ...; repro.report.collect
# makes them): their cells are not trained again. RECORDS= trains all.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/python.sh
source scripts/records.sh

PRESET="${PRESET:-cpu}"
PARTS="${PARTS:-rdm attn arcl multi tokens mim ar}"
SEEDS="${SEEDS:-0 1 2}"
FEW_SEEDS="${FEW_SEEDS-$(cut -d' ' -f1,2 <<<"$SEEDS")}" # of the arms that cost most
FLAGS="${FLAGS:-}" # appended to every line that trains, e.g. "--data_path /data/cifar10"
DATASETS="${DATASETS:-CIFAR10 CIFAR100 IMNET100}" # of PRESET=paper
TFLOPS="${TFLOPS:-20}" # 10^12 operations a second that a GPU sustains, for the estimate
case "$PRESET" in
    cpu) folder="results/ssl" ;;
    paper) folder="results/ssl_paper" ;;
    *) echo "error: PRESET is cpu or paper, not $PRESET" >&2 && exit 2 ;;
esac
RESULTS="${RESULTS:-$folder/runs}"
folder="$(dirname "$RESULTS")"
place="$(printf %q "$RESULTS")" # as a word of a line
RECORDS="${RECORDS-$(compgen -G "$folder/*/records.jsonl" | paste -sd, || true)}"

has() { case " $PARTS " in *" $1 "*) true ;; *) false ;; esac; }
for part in $PARTS; do
    case "$part" in rdm | attn | arcl | multi | tokens | mim | ar) ;; *)
        echo "error: PARTS knows rdm, attn, arcl, multi, tokens, mim and ar, not $part" >&2 && exit 2 ;;
    esac
done

# run SEEDS NAME flags...: a line for each seed.
run() {
    local seeds="$1" name="$2" seed
    shift 2
    for seed in $seeds; do
        echo "python -m SSL_cifar.main --config SSL_cifar/configs/$* --seed $seed${FLAGS:+ $FLAGS}" \
            "--output_dir $place/$name-seed$seed"
    done
}
# cluster NAME flags...: centres of patches.
cluster() {
    echo "python -m SSL_cifar.tokens ${*:2} --output_dir $place/tokens/$1"
}
centres() { echo "--center_path $place/tokens/$1/centres.safetensors"; }

# -- small networks on 10,000 images of CIFAR-10 -----------------------------------------------------------------------

cpu_rdm() {
    local rdm="siamese_cpu.yaml --method rdm_simsiam"
    run "$SEEDS" rdm/symmetric $rdm --sigma 0
    run "$SEEDS" rdm/online+1 $rdm --pred_location online --sigma 1
    run "$SEEDS" rdm/target-1 $rdm --pred_location target --sigma -1
    run "$SEEDS" rdm/target-0.5 $rdm --pred_location target --sigma -0.5
    run "$SEEDS" rdm/target+1 $rdm --pred_location target --sigma 1 --negative_control
    run "$SEEDS" rdm/simsiam siamese_cpu.yaml --method simsiam --pred_lr_factor 10 --batch_size 64 --lr 0.03
    run "$FEW_SEEDS" rdm/byol siamese_cpu.yaml --method byol --pred_hidden_dim 512
    run "$FEW_SEEDS" rdm/byol-target-1 siamese_cpu.yaml --method rdm_byol --pred_location target --sigma -1
}
cpu_attn() {
    run "$SEEDS" attn/simclr contrast_cpu.yaml --method simclr
    run "$SEEDS" attn/beta1 contrast_cpu.yaml --method simclr_attn --beta 1
    run "$SEEDS" attn/beta4 contrast_cpu.yaml --method simclr_attn --beta 4
}
cpu_arcl() {
    local arcl="contrast_cpu.yaml --method arcl --num_views 4 --shifts"
    run "$FEW_SEEDS" arcl/worst4 $arcl
    run "$FEW_SEEDS" arcl/average4 $arcl --align average
    run "$FEW_SEEDS" arcl/simclr30 contrast_cpu.yaml --method simclr --epochs 30 --shifts # as many passes
}
cpu_multi() {
    local lam
    for lam in 0 0.5; do
        run "$SEEDS" "multi/lambda$lam" siamese_cpu.yaml --method simsiam_multi --lam "$lam" --plain_epochs 5 \
            --pred_lr_factor 10 --epochs 16 --batch_size 64 --lr 0.03
    done
}
cpu_tokens() {
    local k
    for k in 10 50 100 500; do
        cluster "pixel$k" --max_train_samples 10000 --num_workers 0 --k "$k"
    done
    cluster pixel256-patch8 --max_train_samples 10000 --num_workers 0 --k 256 --patch_size 8
}
cpu_features() { # tokens of features need a trained network: part attn
    cluster features50 --max_train_samples 10000 --num_workers 0 --k 50 --teacher "$place/attn/simclr-seed0"
}
cpu_mim() {
    run "$FEW_SEEDS" mim/mae mim_cpu.yaml --method mae
    run "$FEW_SEEDS" mim/pixel50 mim_cpu.yaml --method cluster_mim "$(centres pixel50)"
    run "$FEW_SEEDS" mim/pixel500 mim_cpu.yaml --method cluster_mim "$(centres pixel500)"
    if [ -n "$features" ]; then
        run "${FEW_SEEDS%% *}" mim/features50 mim_cpu.yaml --method cluster_mim "$(centres features50)"
    fi
}
cpu_ar() {
    local tokens
    tokens="$(centres pixel256-patch8)"
    run "$FEW_SEEDS" ar/ar ar_cpu.yaml --method ar "$tokens"
    run "$FEW_SEEDS" ar/dar4 ar_cpu.yaml --method dar --offsets 4 "$tokens"
    run "$FEW_SEEDS" ar/dar6 ar_cpu.yaml --method dar --offsets 6 "$tokens" # farther than the 4 patches of a row
    run "$FEW_SEEDS" ar/masked ar_cpu.yaml --method vlm --mask_ratio_min 0.5 --mask_ratio_max 0.5 "$tokens"
    run "$FEW_SEEDS" ar/variable ar_cpu.yaml --method vlm "$tokens"
}

# -- the published sizes -----------------------------------------------------------------------------------------------

config() { # FAMILY DATA: its file, which knows the epochs
    case "$2" in
        IMNET100) echo "$1_imagenet100.yaml" ;;
        *) echo "$1_cifar.yaml --data_set $2" ;;
    esac
}
paper_multi() {
    local data backbone
    for data in $DATASETS; do for backbone in resnet18 resnet50; do
        run "$SEEDS" "multi/$data-$backbone-simsiam" $(config simsiam "$data") --method simsiam --backbone "$backbone"
        run "$SEEDS" "multi/$data-$backbone-multi" $(config simsiam "$data") --method simsiam_multi --lam 0.5 \
            --plain_epochs 51 --backbone "$backbone"
    done; done
}
paper_attn() { # the temperatures of the released code
    local data backbone beta tau
    for data in $DATASETS; do for backbone in resnet18 resnet50; do for beta in 0 1; do
        case "$data" in IMNET100) tau=0.1 ;; *) tau=0.7 ;; esac
        run "$SEEDS" "attn/$data-$backbone-beta$beta" $(config simclr "$data") --method simclr_attn --beta "$beta" \
            --temperature "$tau" --backbone "$backbone"
    done; done; done
}
paper_rdm() {
    local data sigma filter
    for data in $DATASETS; do
        for sigma in -1 -0.7 -0.5 -0.3; do
            run "$SEEDS" "rdm/$data-target$sigma" $(config simsiam "$data") --epochs 400 --method rdm_simsiam \
                --pred_type poly --pred_location target --sigma "$sigma"
        done
        for filter in "poly --sigma 1" "poly --sigma 2" log log_1; do
            run "$SEEDS" "rdm/$data-online-${filter//[ -]/}" $(config simsiam "$data") --epochs 400 --method rdm_simsiam \
                --pred_location online --pred_type $filter
        done
        case "$data" in IMNET100) continue ;; esac
        run "$SEEDS" "rdm/$data-byol-online+1" $(config byol "$data") --method rdm_byol \
            --pred_type poly --pred_location online --sigma 1
    done
}
paper_arcl() {
    local views
    for views in 2 4 6 8; do
        run "$SEEDS" "arcl/simclr-worst$views" $(config simclr CIFAR10) --method arcl --num_views "$views"
        run "$SEEDS" "arcl/simclr-average$views" $(config simclr CIFAR10) --method arcl --num_views "$views" --align average
    done
    for views in 2 3 4; do
        run "$SEEDS" "arcl/moco-worst$views" $(config simclr CIFAR10) --method arcl --base moco --num_views "$views"
    done
}
paper_tokens() {
    local k
    for k in 50 500; do
        cluster "pixel$k" --data_set IMNET100 --crop_size 224 --eval_crop_ratio 0.875 --patch_size 16 --k "$k"
    done
}
paper_mim() {
    run "$SEEDS" mim/mae mae_imagenet100.yaml --method mae
    run "$SEEDS" mim/pixel50 mae_imagenet100.yaml --method cluster_mim "$(centres pixel50)"
    run "$SEEDS" mim/pixel500 mae_imagenet100.yaml --method cluster_mim "$(centres pixel500)"
}
paper_features() { :; }
paper_ar() { :; } # no setting is published

# -- running -----------------------------------------------------------------------------------------------------------

features=""
if has mim && [ "$PRESET" = cpu ] && { has attn || [ -e "$RESULTS/attn/simclr-seed0/record.json" ]; }; then features=1; fi
stage() { for part in "$@"; do if has "$part"; then "${PRESET}_$part"; fi; done; }
first() { stage tokens rdm attn arcl multi; }
second() { if [ -n "$features" ]; then "${PRESET}_features"; fi; }
third() { stage mim ar; }

dry=""
for argument in "$@"; do case "$argument" in --dry-run | --dry_run) dry=1 ;; esac; done
if [ "$PRESET" = paper ] && [ -n "$dry" ]; then
    { first && second && third; } | "$PYTHON" -m SSL_cifar.plan --tflops "$TFLOPS"
    exit
fi
status=0
for step in first second third; do # features need a trained network, and the methods on tokens the tokens
    lines="$("$step")"
    if [ -z "$lines" ]; then continue; fi
    ran "$PYTHON" -m repro.sweep --results "$RESULTS" ${RECORDS:+--records "[$RECORDS]"} --jobs "${JOBS:-2}" \
        --cluster "${CLUSTER:-local}" "$@" <<<"$lines"
done
if plan_only "$@"; then exit "$status"; fi

# -- reporting ---------------------------------------------------------------------------------------------------------

# found PART: its records, new and old, as a list; nothing where there are none.
found() {
    local file list=""
    for file in ${RECORDS//,/ }; do
        if [ "$(basename "$(dirname "$file")")" = "$1" ]; then list="$file"; fi
    done
    if has_runs "$RESULTS/$1"; then
        list="$list${list:+,}$RESULTS/$1"
    fi
    echo "${list:+[$list]}"
}
report() { "$PYTHON" -m "$@" || status=1; } # one that fails does not keep the others
# table PART BASE [METRIC ...]: each metric against the base; those that are no accuracy as they are.
table() {
    local records part="$1" base="$2" metric percent
    if ! has "$part"; then return; fi
    records="$(found "$part")"
    if [ -z "$records" ]; then return; fi
    for metric in knn_accuracy linear_accuracy "${@:3}"; do
        case "$metric" in *accuracy*) percent="--percent" ;; *) percent="--no_percent" ;; esac
        report repro.report.tables --preset ssl --records "$records" --against "$base" --metric "$metric" "$percent" \
            --output "$folder/$part-$metric.md"
    done
    report repro.report.figures --records "$records" --kind spectrum --output "$folder/$part-spectrum"
    report repro.report.figures --records "$records" --kind curves --output "$folder/$part-curves"
    if [ "$part" = ar ]; then
        report repro.report.figures --records "$records" --kind prefix --output "$folder/$part-prefix"
    fi
}
if [ "$PRESET" = cpu ]; then
    table rdm "RDM-SimSiam online poly σ=0" erank_cov_h
    table attn "SimCLR τ=0.5"
    table arcl "AAL m=4 τ=0.5" worst_alignment shifted_accuracy
    table multi "SimSiam-Multi λ=0" train_loss
    table mim MAE
    table ar AR linear_accuracy_best_layer next_token_nll
    records="$(found tokens)"
    if has tokens && [ -n "$records" ]; then report SSL_cifar.tcas --records "$records" --output "$folder/tokens.md"; fi
    everything="$(for part in $PARTS; do found "$part" | tr -d '[]'; done | grep . | paste -sd,)"
    report SSL_cifar.claims --records "[$everything]" --output "$folder/claims.md"
else
    for part in $PARTS; do
        records="$(found "$part")"
        if [ -n "$records" ] && [ "$part" != tokens ]; then
            report repro.report.tables --preset ssl --records "$records" --output "$folder/$part.md"
        fi
    done
fi
exit "$status"
