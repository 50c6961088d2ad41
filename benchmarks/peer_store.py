"""A peer's store of projected gradients: bergson 2.5.1."""

import logging
import shutil
from pathlib import Path

import torch
from bergson import IndexConfig, PreprocessConfig, collect_gradients, load_gradients
from bergson.data import allocate_batches
from bergson.utils.worker_utils import create_processor, setup_model_and_peft
from datasets import Dataset, disable_progress_bars
from workloads import Workload

# Tokens a batch: its default; 1,024 and 4,096 were no faster.
TOKENS = 2_048


class Bergson:
    """Two-sided random projections of every followed layer's gradients, written to a folder as its users do.

    Args:
        workload: The model, which must be one of transformers, and its data.
        folder: Where its files go.
        rank: Numbers kept on each side.
    """

    def __init__(self, workload: Workload, folder: Path, *, rank: int = 16):
        logging.disable(logging.INFO)
        disable_progress_bars()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        workload.model.save_pretrained(folder / "model")  # type: ignore[operator]
        self.config = IndexConfig(
            run_path=str(folder / "store"), model=str(folder / "model"), projection_dim=rank,
            token_batch_size=TOKENS,
        )  # fmt: skip
        self.model, self.modules = setup_model_and_peft(self.config)
        rows = [workload.train_dataset[i]["input_ids"].tolist() for i in range(len(workload.train))]
        self.data = Dataset.from_dict(
            {"input_ids": rows, "labels": rows, "length": [len(row) for row in rows]}
        )

    def build(self) -> None:
        """The store, of the model and the data that lie ready in memory."""
        shutil.rmtree(self.config.partial_run_path, ignore_errors=True)
        self.config.partial_run_path.mkdir(parents=True)
        processor = create_processor(self.model, self.config, self.modules)  # type: ignore[arg-type]
        collect_gradients(
            self.model, self.data, processor, self.config,  # type: ignore[arg-type]
            batches=allocate_batches(self.data["length"][:], TOKENS),
            target_modules=self.modules, preprocess_cfg=PreprocessConfig(),
        )  # fmt: skip

    def rows(self) -> torch.Tensor:
        """What it wrote (n, dim)."""
        return torch.from_numpy(load_gradients(self.config.partial_run_path).copy())
