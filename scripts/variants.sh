# Sourced by the sweeps of BERT_glue and ViT_imagenet.
# methods VANILLA [BEFORE [AFTER]]: the flags of each method that VARIANTS and SCALES name, one a line, each once. VANILLA are
# the vanilla model's; ContraNorm's scale stands between BEFORE and AFTER. VARIANTS: none is vanilla; contranorm takes
# SCALES, in which vanilla may stand too; contranorm+gfsa is both; anything else is a --variant.
methods() {
    local vanilla="$1" before="${2:-}" after="${3:-}" variant scale rival
    for variant in $VARIANTS; do
        rival="${variant#contranorm}" rival="${rival#+}"
        case "$variant" in
            none) echo "$vanilla" ;;
            contranorm | contranorm+*) for scale in $SCALES; do
                if [ "$scale" = vanilla ]; then echo "$vanilla"; else
                    echo "${before:+$before }--scale $scale${rival:+ --variant $rival}${after:+ $after}"
                fi
            done ;;
            *) echo "$vanilla --variant $variant" ;;
        esac
    done | awk '!seen[$0]++'
}
