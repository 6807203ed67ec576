"""``ijepa-fast accelerate-official``: the official training script, started from the arguments of its ``main.py``.

``main.py`` only starts one process per device. That is done here instead, so that each process has the replacements of
``accelerate`` in place before ``src.train`` is imported.
"""

from __future__ import annotations

import argparse
import importlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from ijepa_fast.interop.official.replacements import CheckoutError, accelerate


def launch(checkout: Path | str, arguments: list[str]) -> None:
    """Train with the configuration and on the devices that the arguments name.

    Under torchrun, this process is one rank of the job, on GPU number ``LOCAL_RANK``, and ``--devices`` is not read.

    Args:
        checkout: folder of the official code.
        arguments: of its main.py: ``--fname CONFIG`` (a file here, or in the checkout) and ``--devices cuda:0 cuda:1``;
            ``--devices cpu`` trains on the CPU.

    Raises:
        ValueError: arguments or configuration that cannot be used.
    """
    parsed = _parse(arguments)
    config = _read_config(Path(parsed.fname), Path(checkout))
    accelerate(checkout)  # what does not fit is told here, and once
    if "RANK" in os.environ:
        _rank(int(os.environ["RANK"]), _torchrun_device(), str(checkout), config)
        return
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(len(parsed.devices))}
    torch.multiprocessing.start_processes(
        _started, args=(parsed.devices, str(checkout), config), nprocs=len(parsed.devices), start_method="spawn"
    )


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="main.py", add_help=False, exit_on_error=False)
    parser.add_argument("--fname", default="configs.yaml")
    parser.add_argument("--devices", nargs="+", default=["cuda:0"])
    try:
        parsed, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(f"main.py of the official code: {error}") from None
    if unknown:
        raise ValueError(
            f"main.py of the official code has no arguments {' '.join(unknown)}; it has --fname, --devices"
        )
    wrong = [name for name in parsed.devices if name != "cpu" and not name.removeprefix("cuda:").isdigit()]
    if wrong or ("cpu" in parsed.devices and len(set(parsed.devices)) > 1):
        raise ValueError(f"--devices must be like cuda:0 cuda:1, or cpu, got {' '.join(parsed.devices)}")
    return parsed


def _read_config(path: Path, checkout: Path) -> dict:
    if not path.exists() and (checkout / path).is_file():
        path = checkout / path
    try:
        config = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    needed = ("data", "logging", "mask", "meta", "optimization")
    if not isinstance(config, Mapping) or not set(needed) <= config.keys() or "folder" not in config["logging"]:
        raise ValueError(
            f"{path} is no configuration of the official code: it needs {', '.join(needed)}, and logging a folder"
        )
    return config


def _torchrun_device() -> str:
    # Counted by NVML. torch.cuda.is_available() would start CUDA, which reads CUDA_VISIBLE_DEVICES once and for all.
    if not torch.cuda.device_count():
        return "cpu"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    local_rank = int(os.environ["LOCAL_RANK"])
    return visible.split(",")[local_rank] if visible else str(local_rank)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _started(rank: int, devices: list[str], checkout: str, config: dict) -> None:
    _rank(rank, devices[rank], checkout, config)


def _rank(rank: int, device: str, checkout: str, config: dict) -> None:
    """Train in this process, which sees its own device alone, as the official code wants it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if device == "cpu" else device.removeprefix("cuda:")
    os.environ["RANK"] = str(rank)
    os.environ.pop("SLURM_LOCALID", None)  # src.train would take it for the device
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"torch sees no CUDA device {device}; --devices cpu trains on the CPU")
    # The official code takes a process group that is there; the one it makes itself fails silently.
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    try:
        accelerate(checkout)
        Path(config["logging"]["folder"]).mkdir(parents=True, exist_ok=True)
        try:
            train = importlib.import_module("src.train")
        except ModuleNotFoundError as error:
            raise CheckoutError(f"the official code needs {error.name}, which is not installed") from error
        if not callable(getattr(train, "main", None)):
            raise CheckoutError(f"no main in {train.__file__}: not the official I-JEPA code")
        train.main(args=config)
    finally:
        dist.destroy_process_group()
