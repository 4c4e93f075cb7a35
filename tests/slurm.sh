#!/usr/bin/env bash
# The first rows of the smoke table through a real Slurm of one node, started here and stopped again.
# A job is told to stop by `scancel --signal` and goes on from its checkpoint. `skipped: ...` where Slurm cannot be had.
set -euo pipefail
cd "$(dirname "$0")/.."

skip() {
    echo "skipped: $*"
    exit 0
}
if ! { command -v slurmctld && command -v slurmd && command -v munged; } >/dev/null; then
    command -v apt-get >/dev/null || skip "Slurm is not installed, and there is no apt-get to install it with"
    [ "$(id -u)" -eq 0 ] || skip "Slurm is not installed, and only root may install it"
    { apt-get update && apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge; } \
        >/dev/null 2>&1 || skip "apt-get cannot install slurmctld, slurmd and munge here"
fi
[ "$(id -u)" -eq 0 ] || skip "slurmd wants to be started by root"
[ ! -e /etc/slurm/slurm.conf ] || skip "this machine has a Slurm of its own: /etc/slurm/slurm.conf"

work=$(mktemp -d)
pids=()
stop() {
    set +e
    scancel --partition=gpu 2>/dev/null
    sleep 3 # a job that does not end is killed after KillWait
    kill "${pids[@]}" 2>/dev/null
    sleep 1 # Snakemake would wait for its jobs
    kill -KILL "${pids[@]}" 2>/dev/null
    wait
    rm -rf "$work" /etc/slurm/slurm.conf /etc/slurm/gres.conf
}
trap stop EXIT
chmod 755 "$work"
mkdir -p /etc/slurm

# 1. A cluster of this machine, with one GPU that is none
host=$(hostname -s)
dd if=/dev/urandom of="$work/munge.key" bs=1024 count=1 status=none
chmod 400 "$work/munge.key"
munged --foreground --force --key-file="$work/munge.key" --socket="$work/munge.socket" --pid-file="$work/munge.pid" \
    --log-file="$work/munge.log" --seed-file="$work/munge.seed" >/dev/null 2>&1 &
pids+=($!)
cat >/etc/slurm/slurm.conf <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge.socket
CredType=cred/munge
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
KillWait=2
MinJobAge=36000
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 RealMemory=16000 Gres=gpu:1
PartitionName=gpu Nodes=$host Default=YES
END
echo "NodeName=$host Name=gpu File=/dev/null" >/etc/slurm/gres.conf
mkdir "$work/state" "$work/spool"
slurmctld -D >"$work/slurmctld.log" 2>&1 &
pids+=($!)
slurmd -D >"$work/slurmd.log" 2>&1 &
pids+=($!)
for _ in $(seq 30); do
    [ "$(sinfo --noheader --format=%t 2>/dev/null)" = idle ] && break
    sleep 1
done
[ "$(sinfo --noheader --format=%t)" = idle ] || { tail -n 5 "$work"/*.log; skip "Slurm does not start here"; }

# 2. The student and, before it, its teacher
student=results/smoke/kd_cutmix/seed0 teacher=results/smoke/teacher_cutmix/seed0
"$(uv run --extra table sh -c 'command -v snakemake')" --profile profiles/slurm --snakefile Snakefile --directory "$work" \
    --slurm-init-seconds-before-status-checks 2 --slurm-status-command squeue --slurm-no-account \
    --slurm-logdir "$work/slurm" --latency-wait 5 \
    --config protocol=smoke wandb_mode=disabled -- "$student/result.json" >"$work/snakemake.log" 2>&1 &
snakemake=$!
pids+=("$snakemake")

# 3. The teacher's job is told to stop
until [ -e "$work/$teacher/checkpoint.safetensors" ]; do
    kill -0 "$snakemake" || { cat "$work/snakemake.log"; exit 1; }
    sleep 0.2
done
job=$(squeue --noheader --states=running --format=%i)
squeue --format="%i %T %P %b %c" | sed 's/^/    /'
scancel --signal=USR1 "$job"

# 4. It is submitted again, goes on, and the student follows
wait "$snakemake" || { cat "$work/snakemake.log" "$work/$teacher/run.log"; exit 1; }
scontrol show job "$job" | grep --only-matching 'JobState=[A-Z]*' | grep FAILED >/dev/null
grep "resuming" "$work/$teacher/run.log"
tail -n 6 "$work/$student/run.log"
echo "passed: job $job was stopped and went on"
