#!/usr/bin/env bash
# A Slurm of one node, this machine, without root's daemons: everything lies in a folder.
#
#   tests/launch/slurm_node.sh start FOLDER    then: export SLURM_CONF=FOLDER/slurm.conf
#   tests/launch/slurm_node.sh stop FOLDER
#
# It needs Debian's slurm-wlm and munge, and to be root, whose jobs slurmd runs.
set -euo pipefail
folder=$(realpath -m "$2")
case "$1" in
  start) ;;
  stop)
    for name in slurmd slurmctld munged; do
      if [ -s "$folder/$name.pid" ]; then kill "$(cat "$folder/$name.pid")" || true; fi
    done
    exit ;;
  *) echo "usage: $0 start|stop FOLDER" >&2; exit 2 ;;
esac
port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}
mkdir -p "$folder"/{state,spool,logs}
chmod 755 "$folder"
host=$(hostname -s)
dd if=/dev/urandom of="$folder/munge.key" bs=64 count=1 status=none
chmod 400 "$folder/munge.key"
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
  --pid-file="$folder/munged.pid" --log-file="$folder/logs/munged" \
  --seed-file="$folder/munge.seed"
cat > "$folder/slurm.conf" <<END
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(port)
SlurmdPort=$(port)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/logs/slurmctld
SlurmdLogFile=$folder/logs/slurmd
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,defer_batch=no
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
KillWait=30
ReturnToService=2
MpiDefault=none
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
export SLURM_CONF=$folder/slurm.conf
slurmctld
slurmd -N "$host"
for _ in $(seq 60); do
  if sinfo --noheader --format=%t 2> /dev/null | grep -q idle; then exit; fi
  sleep 1
done
echo "no idle node within a minute; see $folder/logs" >&2
exit 1
