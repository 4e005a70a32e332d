#!/bin/bash
# Stands for the ranks' Python: `-m megatron_eso train` becomes the stand-in trainer beside this file.
python=${STAND_IN_PYTHON:-python3}
if [ "$2" = megatron_eso ]; then
    shift 2
    exec "$python" "$(dirname "$0")/trainer.py" "$@"
fi
exec "$python" "$@"
