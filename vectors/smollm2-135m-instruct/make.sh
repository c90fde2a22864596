#!/usr/bin/env bash
# Makes this pack again: the same bytes on the same machine, within float noise on another.
# Needs mien and the default model; about 15 minutes on 2 cores. `make pack` runs it.
set -euo pipefail
cd "$(dirname "$0")"

mien extract joy sadness anger fear calm \
    --group contrast --template contrast/template.txt \
    --layers 6-28 --calibrate contrast/calibration.txt \
    --kind emotion --licence Apache-2.0

mien pack build . --name smollm2-135m-instruct --version 1.0.0 --licence Apache-2.0 \
    --description "Five emotions for SmolLM2-135M-Instruct."
