#!/usr/bin/env bash
# Students where nobody has seen more than 100 or 500 labels: the table of the README and of docs/guides/heads.md, and
# that of docs/guides/embeddings.md.
#
#     python examples/tables/efficientnet_features.py                     # makes features.onnx
#     examples/tables/few_labels.sh FOLDER features.onnx
#
# FOLDER has CIFAR-10 as JPEGs: 20,000 in train/<class>/ and 10,000 in test/<class>/. Takes some 4 hours on 2 CPU cores.
# What is finished is not done again: stopped, the same command goes on.
set -euo pipefail
data=folder:${1:-cifar} network=${2:-features.onnx}
caches=caches/few-labels runs=runs/few-labels

student() { # name of the run, its cache, then what and how it learns
    local name=$1 cache=$2
    shift 2
    test -f "$runs/$name/result.json" || softcache student --data "$data" --cache "$caches/$cache" --arch resnet20 "$@" \
        --out "$runs/$name"
}

# Features of 8 views of each image, no labels; a student of them.
softcache teacher-cache --data "$data" --task embedding --teacher "onnx:$network" --teacher-size 128 \
    --normalize mean=0.5,std=0.5 --views crop-flip:size=32 --draws 8 --out $caches/features
embed=(--loss embed:kind=cosine,standardize=std --optimizer adamw)
student embedding features "${embed[@]}" --learning-rate 0.003 --epochs 20
student embedding-longer features "${embed[@]}" --learning-rate 0.002 --epochs 12 --init $runs/embedding

# The same network from all labels, and the figures of its features.
test -f $runs/all-labels/result.json || softcache teacher --data "$data" --arch resnet20 --epochs 20 \
    --views crop-flip:size=32 --normalize mean=0.5,std=0.5 --out $runs/all-labels
softcache teacher-cache --data "$data" --task embedding --weights $runs/all-labels --views crop-flip:size=32 --draws 1 \
    --out $caches/all-labels
test -f $runs/all-labels-features/result.json || softcache student --data "$data" --cache $caches/all-labels \
    --arch mlp:8 --epochs 1 --out $runs/all-labels-features

# Three draws of the labels. A student of 500 labels starts from the better student of the features.
for seed in 0 1 2; do
    for labels in 100 500; do
        name=$labels-$seed
        softcache head-cache $caches/features --data "$data" --head probe --labelled $labels --seed $seed \
            --out $caches/$name
        init=$runs/embedding
        test $labels = 100 || init=$runs/embedding-longer
        student $name $name --init $init --loss kd:temperature=2 --learning-rate 0.05 --epochs 4 --seed $seed
        student hard-$name $name --loss hard --labelled $labels --epochs $((labels / 400 + 1)) --seed $seed
    done
done
