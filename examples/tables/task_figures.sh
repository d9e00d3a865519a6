#!/usr/bin/env bash
# The tables of several labels and of numbers in docs/guides/several-labels.md and docs/guides/numbers.md.
#
#     python examples/tables/task_data.py                                 # makes the arrays in this folder
#     examples/tables/task_figures.sh
#
# Takes some 40 minutes on 2 CPU cores. What is finished is not done again: stopped, the same command goes on.
set -euo pipefail
export PYTHONPATH="$(cd "$(dirname "$0")" && pwd)${PYTHONPATH:+:$PYTHONPATH}" # regressors.py
runs=runs/tasks caches=caches/tasks

teacher() { # name of the run, its data, then how it is trained
    local name=$1 data=arrays:$2.npz
    shift 2
    test -f "$runs/$name/result.json" || softcache teacher --data "$data" "$@" --out "$runs/$name"
}
student() { # name of the run, its data, then its cache and how it is trained
    local name=$1 data=arrays:$2.npz
    shift 2
    test -f "$runs/$name/result.json" || softcache student --data "$data" --seeds 3 "$@" --out "$runs/$name"
}

# Several labels: a student has a tenth of them.
several_labels() { # the data, the views, then the options of the students
    local data=$1 views=$2
    shift 2
    softcache teacher-cache --data "arrays:$data.npz" --weights "$runs/$data-teacher" --views "$views" --draws 4 \
        --out "$caches/$data"
    set -- --cache "$caches/$data" "$@"
    student "$data-bce" "$data" "$@" --loss bce
    student "$data-bce-10" "$data" "$@" --loss bce:weight=10
    student "$data-kd" "$data" "$@" --loss kd_sigmoid --loss bce:weight=0.1
    student "$data-mlkd" "$data" "$@" --loss mlkd --loss bce
    softcache compare "$runs/$data-bce" "$runs/$data-bce-10" "$runs/$data-kd" "$runs/$data-mlkd"
}
teacher canvases-teacher canvases --arch resnet8 --views crop:pad=2 --epochs 8 --select map
several_labels canvases crop:pad=2 --arch mlp:256 --labelled 1300 --epochs 20
teacher yeast-teacher yeast --arch mlp:512,512 --views noise:std=0.02 --epochs 20 --select map
several_labels yeast noise:std=0.02 --arch mlp:64 --labelled 120 --epochs 60

# Numbers: a student has a tenth of the hard ones.
for kind in boosting ridge networks; do
    softcache teacher-cache --data arrays:diabetes.npz --task numbers --teacher regressors:$kind \
        --views noise:std=0.015 --draws 30 --out $caches/diabetes-$kind
    options=(--cache $caches/diabetes-$kind --arch mlp:32 --labelled 30 --epochs 60)
    student diabetes-$kind diabetes "${options[@]}" --loss kd_mse --baseline
    student diabetes-$kind-bounded diabetes "${options[@]}" --loss kd_mse --loss bounded:weight=0.5
done
teacher rotated-teacher rotated --arch resnet8 --clip-norm 1 --views crop:pad=2 --epochs 8
softcache teacher-cache --data arrays:rotated.npz --weights $runs/rotated-teacher --views crop:pad=2 --draws 5 \
    --out $caches/rotated
student rotated rotated --cache $caches/rotated --arch mlp:256 --clip-norm 1 --loss kd_mse --labelled 2000 --epochs 15 --baseline
