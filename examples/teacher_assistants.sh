#!/usr/bin/env bash
# A gap between teacher and student that is too wide, crossed in steps: the digits' cnn teaches mlp:16 directly, and through
# an assistant mlp:64, and a hint from the layer that tells most about the classes goes to another cnn.
#
# Takes some minutes on 2 CPU cores. Nothing is downloaded.
set -euo pipefail

softcache teacher-cache --taps pool1,pool2,flatten --out caches/assistants
softcache inspect caches/assistants --out runs/assistants/inspect
softcache student --cache caches/assistants --arch mlp:16 --baseline --out runs/assistants/direct
softcache born-again --cache caches/assistants --archs mlp:64+mlp:16 --out runs/assistants/chain
softcache student --cache caches/assistants --arch cnn --loss kd --loss hint:teacher=pool2,student=pool2 \
    --out runs/assistants/hint
softcache compare runs/assistants/direct runs/assistants/chain/generation-2
