#!/usr/bin/env bash
# Rare classes: a long tail of MNIST (2,478 images), six ways to learn it, 5 seeds each, side by side. The table of
# docs/guides/rare-classes.md.
#
# Takes less than half an hour on 2 CPU cores. MNIST is downloaded into datasets/ where it is not there; further arguments go to
# each command: examples/long_tail.sh --data-root /where/mnist/is
# What is finished is not done again: stopped, the same command goes on.
set -euo pipefail
runs=runs/long-tail
cache=caches/mnist-long-tail

test -f $runs/teacher/result.json || softcache teacher --data mnist "$@" --imbalance 100 --head-size 1000 \
    --arch mlp:800,800 --views none --epochs 40 --learning-rate 0.02 --weight-decay 5e-4 --out $runs/teacher
test -f $cache/manifest.json || softcache teacher-cache --data mnist "$@" --imbalance 100 --head-size 1000 \
    --weights $runs/teacher --out $cache

student() { # name of the run, then what the student learns from
    local name=$1
    shift
    test -f "$runs/$name/result.json" || softcache student --cache $cache --arch mlp:128 --epochs 40 --seeds 5 "$@" \
        --out "$runs/$name"
}
student hard        "$@" --loss hard
student kd          "$@" --loss kd:temperature=4,weight=0.9 --loss hard:weight=0.1
student kd-prior    "$@" --map prior --loss kd:temperature=4,weight=0.9 --loss logit_adjusted:weight=0.1
student balanced-kd "$@" --loss hard --loss balanced_kd
student dive        "$@" --map prior --loss balanced_softmax:weight=0.5 --loss dive:weight=0.5
student f1          "$@" --recipe f1

softcache compare $runs/hard $runs/kd $runs/kd-prior $runs/balanced-kd $runs/dive $runs/f1
