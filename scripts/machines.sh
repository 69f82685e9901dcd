# Sourced by the launch scripts: sets MACHINES to the flags of `accelerate launch` for one or several machines.
#
# One machine (WORLD_SIZE unset or 1): only NUM_PROCESS is used, the number of processes (default: one per GPU).
# Several machines: start the same script on each machine with
#   MASTER_ADDR  address of machine 0
#   MASTER_PORT  free port on machine 0 (default: 10086)
#   WORLD_SIZE   number of machines
#   NUM_PROCESS  number of processes on all machines together
#   RANK         index of this machine, from 0
MACHINES=()
if [ "${WORLD_SIZE:-1}" = 1 ]; then
  unset MASTER_ADDR MASTER_PORT WORLD_SIZE RANK  # torch would read them as numbers of processes
  if [ -n "${NUM_PROCESS:-}" ]; then
    MACHINES+=(--num_machines=1 --num_processes="$NUM_PROCESS")
  fi
else
  export MASTER_PORT="${MASTER_PORT:-10086}"
  # Ends with one error line within a minute if a machine is missing; torch alone would wait ten minutes or more.
  TORCH_CPP_LOG_LEVEL=FATAL python -m videox.distributed.rendezvous
  MACHINES+=(--main_process_ip="$MASTER_ADDR" --main_process_port="$MASTER_PORT" --num_machines="$WORLD_SIZE"
    --num_processes="$NUM_PROCESS" --machine_rank="$RANK" --rdzv_conf="timeout=${VIDEOX_MEETING_SECONDS:-60}")
fi
