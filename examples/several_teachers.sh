#!/usr/bin/env bash
# Several teachers: the public ResNet-56 and ResNet-20 for CIFAR-10 as one teacher, every way to combine them side by side
# (the table of docs/guides/several-teachers.md), then a student of both.
#
# Takes a quarter of an hour for the caches on 2 CPU cores, and some hours for the student.
# Wants a folder of CIFAR-10 images and the two checkpoints:
#   examples/several_teachers.sh /where/cifar10/is resnet56.th resnet20.th
set -euo pipefail
images=${1:-cifar10-images}
resnet56=${2:-resnet56.th}
resnet20=${3:-resnet20.th}

common=(--data "folder:$images" --normalize imagenet --views crop-flip --draws 1)
softcache teacher-cache "${common[@]}" --teacher resnet56 --weights "$resnet56" --out caches/r56
softcache teacher-cache "${common[@]}" --teacher resnet20 --weights "$resnet20" --out caches/r20

softcache blend --cache caches/r56 --cache caches/r20
softcache student --data "folder:$images" --cache caches/r56 --cache caches/r20 --combine learned --arch resnet8 \
    --out runs/resnet8-of-two
