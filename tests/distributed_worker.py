"""Trains a toy config on several gloo processes; started by torchrun in test_distributed."""

import json
import sys
from pathlib import Path

from accelerate import DistributedType, FullyShardedDataParallelPlugin

from diffdistill.commands.train import train
from diffdistill.config import parse_config
from diffdistill.distributed import Distributed


def shard_on_cpu(by_block: bool) -> None:
    """Let runs shard with FSDP2; accelerate itself starts it on accelerators only."""
    original = Distributed.__init__

    def start(self: Distributed) -> None:
        original(self)
        state = self.accelerator.state
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            cpu_ram_efficient_loading=False,
            auto_wrap_policy="transformer_based_wrap" if by_block else "no_wrap",
        )
        self.sharded = True

    Distributed.__init__ = start  # type: ignore[method-assign]


def main(mode: str, config: str, output: str, resume: str | None = None) -> None:
    if mode in ("fsdp2", "fsdp2-blocks"):
        shard_on_cpu(by_block=mode == "fsdp2-blocks")
    train(parse_config(json.loads(config)), Path(output), resume)


if __name__ == "__main__":
    main(*sys.argv[1:])
