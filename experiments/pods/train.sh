#!/bin/sh
# Trains on this host until the run is finished; ends with 75 where it was only saved.
#   experiments/pods/train.sh OUTPUT CONFIG.yaml [ARGUMENTS]
# A run that SIGTERM stops saves and ends with 0, which a scheduler takes for finished work.  Told to
# try again (75, EX_TEMPFAIL), it starts the same command, which goes on.
set -eu

output=$1
shift
"$(dirname -- "$0")/../../lora" train "$@" --output "$output" --distributed --resume auto &
training=$!
# The first process of a container gets the signal, and nothing else does.
trap 'kill -TERM "$training"' TERM
code=0
wait "$training" || code=$?
# A trap ends the wait, not what is waited for.
while [ "$code" -gt 128 ] && kill -0 "$training" 2>/dev/null; do
    code=0
    wait "$training" || code=$?
done
if [ "$code" = 0 ] && [ ! -e "$output/adapter" ] && [ ! -e "$output/model" ]; then
    code=75
fi
exit "$code"
