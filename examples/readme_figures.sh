#!/usr/bin/env bash
# The figures of the README and of docs/guides/compare-and-report.md: six students of the digits with 3 seeds each, their
# baselines and their teacher, as a report with PNGs, which are copied to docs/. Run it at the top of the checkout.
#
# Takes some 15 minutes on 2 CPU cores. The picture of the whole report needs the system's chromium.
# What is finished is not done again: stopped, the same command goes on.
set -euo pipefail
runs=runs/images
cache=caches/images

test -f $cache/manifest.json || softcache teacher-cache --taps flatten --out $cache

student() { # name of the run, its arch, its losses
    local name=$1 arch=$2
    shift 2
    test -f "$runs/$name/result.json" || softcache student --cache $cache --arch "$arch" --seeds 3 --baseline "$@" \
        --out "$runs/$name"
}
for width in 8 16 32 64 256; do
    student mlp-$width mlp:$width
done
student cnn cnn --loss kd --loss hint:teacher=flatten,student=flatten,weight=0.1

softcache report $runs/mlp-8 $runs/mlp-16 $runs/mlp-32 $runs/mlp-64 $runs/mlp-256 $runs/cnn --png --out $runs/report

test -d docs || exit 0
cp $runs/report/digits-costs.png docs/costs.png
cp $runs/report/runs-images-cnn-curves.png docs/curves.png
if command -v chromium > /dev/null; then
    chromium --headless --no-sandbox --hide-scrollbars --window-size=1280,1100 --screenshot=docs/report.png \
        "file://$PWD/$runs/report/report.html" 2> /dev/null
fi
