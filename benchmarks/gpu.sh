#!/usr/bin/env bash
# What a GPU shows in half an hour, in steps of nine minutes at most; each goes on where it stopped. See gpu.py.
#
#   benchmarks/gpu.sh wheels                beforehand, where there is internet: packs ./gpu for a machine without
#   benchmarks/gpu.sh check                 tests of what touches a device
#   benchmarks/gpu.sh nets                  time and memory of the nets, and what they are of the machine's limits
#   benchmarks/gpu.sh feed                  whole epochs against the step alone
#   benchmarks/gpu.sh camvid                a run to the best figure; the same command again for its next piece
#   benchmarks/gpu.sh camvid_unet_plus_plus | camvid_unet_3plus | nuclei | isbi2012
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu.py" "$@"
