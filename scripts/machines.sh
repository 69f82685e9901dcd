# Serves the launch scripts, which read it: MACHINES becomes the launcher's flags for one machine or several.
#
# Of the five variables NUM_PROCESS alone counts on one machine (WORLD_SIZE unset or 1): the processes to start, all
# GPUs unless set. On several, each machine runs the same script with MASTER_ADDR (of machine 0), MASTER_PORT (10086
# unless set), WORLD_SIZE (machines), NUM_PROCESS (processes of all machines together) and RANK (this machine, from 0).
MACHINES=()
if [ "${WORLD_SIZE:-1}" = 1 ]; then
  unset MASTER_ADDR MASTER_PORT WORLD_SIZE RANK  # for the trainer they would mean processes
  if [ -n "${NUM_PROCESS:-}" ]; then
    MACHINES+=(--num_machines=1 --num_processes="$NUM_PROCESS")
  fi
else
  export MASTER_PORT="${MASTER_PORT:-10086}"
  TORCH_CPP_LOG_LEVEL=FATAL python -m videox.distributed.rendezvous  # out within a minute, with one line, where a machine is missing
  MACHINES+=(--main_process_ip="$MASTER_ADDR" --main_process_port="$MASTER_PORT" --num_machines="$WORLD_SIZE"
    --num_processes="$NUM_PROCESS" --machine_rank="$RANK" --rdzv_conf="timeout=${VIDEOX_MEETING_SECONDS:-60}")
fi
