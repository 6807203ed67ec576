"""Pretrain on a SLURM cluster through submitit: one process per GPU, requeued before its time is up.

    pip install submitit
    python examples/submitit_run.py --nodes 4 --partition gpu -- --config vith14_in1k_exact --data DATA --output RUN

What follows ``--`` are the arguments of ``ijepa-fast pretrain``. Each start continues from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys


class Pretrain:
    """Job of one process. SIGUSR1 saves the run and ends it; the first rank then submits the job again."""

    def __init__(self, arguments: list[str]):
        self.arguments = arguments

    def __call__(self) -> None:
        import submitit

        from ijepa_fast.cli import EXIT_STOPPED, main

        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        status = main(["pretrain", *self.arguments])
        if status == EXIT_STOPPED:  # the other ranks end in peace, or SLURM might end the first before it is heard
            if os.environ["RANK"] == "0":
                os.system(f"scontrol requeue {os.environ['SLURM_JOB_ID']}")
        elif status:
            sys.exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="of a node")
    parser.add_argument("--hours", type=float, default=24)
    parser.add_argument("--partition", default=None)
    parser.add_argument("--logs", default="slurm_logs")
    parser.add_argument("arguments", nargs="+", help="of ijepa-fast pretrain, behind --")
    options = parser.parse_args()
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # which training handles itself, once it runs
    import submitit

    executor = submitit.AutoExecutor(folder=options.logs)
    executor.update_parameters(
        name="ijepa",
        nodes=options.nodes,
        tasks_per_node=options.gpus,
        gpus_per_node=options.gpus,
        cpus_per_task=12,
        timeout_min=int(60 * options.hours),
        slurm_partition=options.partition,
        slurm_signal_delay_s=180,  # seconds before the end at which SLURM sends the signal
        slurm_additional_parameters={"requeue": True},
    )
    job = executor.submit(Pretrain(options.arguments))
    print(f"job {job.job_id}, logs in {options.logs}")


if __name__ == "__main__":
    main()
