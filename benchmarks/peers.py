"""The strongest peer at the same work: kronfluence 1.0.1 (Grosse et al. 2023; Bae et al. 2024)."""

import copy
import logging
from typing import Any

import torch
from kronfluence import Analyzer, FactorArguments, ScoreArguments, Task, prepare_model
from torch import Tensor, nn
from torch.utils.data import Subset
from workloads import Workload

# Examples a batch, the fastest of those tried (see docs/benchmarks/cost.md).
BATCHES = {
    "mlp": {"covariance": 1_000, "eigenvalues": 16, "scores": 512, "self": 128},
    "gpt": {"covariance": 8, "eigenvalues": 8, "scores": 16, "self": 8},
}


class SummedCrossEntropy(Task):
    """The workload's loss, summed over tokens, on its own labels or on labels drawn from the model."""

    def __init__(self, workload: Workload):
        self._workload = workload

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        prediction = self._workload.task.predict(model, batch)
        logits, labels = prediction.logits.flatten(0, 1), prediction.labels.flatten()
        if sample:
            labels = torch.multinomial(logits.detach().softmax(dim=-1), 1).squeeze(1)
        return nn.functional.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return list(self._workload.layers)


class Kronfluence:
    """EK-FAC factors and scores, written to and read from a folder, as its users do.

    Args:
        workload: The model and its data.
        name: Key of the batch sizes.
        folder: Where its files go.
        given: Whether the factors come from the given labels instead of drawn ones.
    """

    def __init__(self, workload: Workload, name: str, folder: str, *, given: bool = False):
        task = SummedCrossEntropy(workload)
        self.workload, self.batch = workload, dict(BATCHES[name])
        model = prepare_model(copy.deepcopy(workload.model), task)
        self.analyzer = Analyzer(
            analysis_name="peer", model=model, task=task, cpu=True, output_dir=folder,
            disable_tqdm=True, log_level=logging.ERROR,
        )  # fmt: skip
        self.factors = FactorArguments(strategy="ekfac", use_empirical_fisher=given)
        self.scoring = ScoreArguments(damping_factor=workload.damping)

    def covariance(self) -> None:
        self.analyzer.fit_covariance_matrices(
            "ekfac", self.workload.train_dataset, per_device_batch_size=self.batch["covariance"],
            factor_args=self.factors, overwrite_output_dir=True,
        )  # fmt: skip

    def eigen(self) -> None:
        self.analyzer.perform_eigendecomposition("ekfac", self.factors, overwrite_output_dir=True)

    def eigenvalues(self) -> None:
        self.analyzer.fit_lambda_matrices(
            "ekfac", self.workload.train_dataset, per_device_batch_size=self.batch["eigenvalues"],
            factor_args=self.factors, overwrite_output_dir=True,
        )  # fmt: skip

    def scores(self, n_queries: int) -> Tensor:
        """(query, train), positive where the example lowers the query's loss."""
        asked = Subset(self.workload.query_dataset, range(n_queries))
        self.analyzer.compute_pairwise_scores(
            f"scores{n_queries}", "ekfac", asked, self.workload.train_dataset,
            per_device_query_batch_size=n_queries, per_device_train_batch_size=self.batch["scores"],
            score_args=self.scoring, overwrite_output_dir=True,
        )  # fmt: skip
        return self.analyzer.load_pairwise_scores(f"scores{n_queries}")["all_modules"]

    def self_influence(self) -> Tensor:
        self.analyzer.compute_self_scores(
            "self", "ekfac", self.workload.train_dataset, per_device_train_batch_size=self.batch["self"],
            score_args=self.scoring, overwrite_output_dir=True,
        )  # fmt: skip
        return self.analyzer.load_self_scores("self")["all_modules"]
