"""The learner: owns the policy, the critic and their optimizers, in one process.

`PPOLearner` is plain and synchronous; `LocalLearner` is the `Learner` role around it for
one process, and the Ray actor forwards to it likewise.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from distrl.algo import AdaptiveKL, FixedKL, lr_factor
from distrl.data.tokenizer import load_tokenizer
from distrl.learn.experience import Experience, to_experience
from distrl.learn.measure import by_age, measure, part_means
from distrl.learn.ppo import MinibatchReport, Prepared, backward, minibatches, prepare
from distrl.learn.record import SMALL, Recorder
from distrl.learn.spec import LearnerSpec
from distrl.learn.state import load_module, load_optimizer, save_module, save_optimizer
from distrl.models.heads import ScalarModel
from distrl.models.load import best_device, load_policy, save_policy
from distrl.records import RolloutBatch, ScoredRollout, StepReport, Weights
from distrl.roles import LearnerFailed
from distrl.sync.canary import publish
from distrl.sync.memory import SharedMemoryPublisher

log = logging.getLogger(__name__)


class PPOLearner:
    """PPO with a separate critic. Not thread-safe: one call at a time."""

    def __init__(self, spec: LearnerSpec) -> None:
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        self.spec, self.config = spec, spec.config
        self.device = best_device() if spec.config.gpus else torch.device("cpu")
        self.tokenizer = load_tokenizer(spec.policy)
        self.policy = load_policy(spec.policy, tokenizer=self.tokenizer)
        self.reference = load_policy(spec.policy).requires_grad_(False)
        self.critic = self._new_critic()
        for module in (self.policy, self.reference, self.critic):
            nn.Module.to(module, self.device)
        self.policy_optimizer = self._adamw(self.policy)
        self.critic_optimizer = self._adamw(self.critic)
        kl = spec.config.kl
        self.kl: AdaptiveKL | FixedKL = (
            AdaptiveKL(kl.coef, kl.target, kl.horizon)
            if kl.kind == "adaptive"
            else FixedKL(kl.coef)
        )
        self.publisher = SharedMemoryPublisher()
        self.recorder = self._new_recorder()
        self.step = 0
        self.version = 0
        self.skips = 0
        self.skips_in_a_row = 0

    def _new_recorder(self) -> Recorder:
        wanted = self.config.record
        if wanted is None:
            wanted = sum(p.numel() for p in self.policy.parameters()) <= SMALL
        folder = self.spec.recording if wanted else None
        return Recorder(folder, int(self.config.record_mib * 2**20))

    def _new_critic(self) -> ScalarModel:
        if self.spec.reward_model is not None:
            return ScalarModel.load(self.spec.reward_model)
        return ScalarModel.from_policy(self.policy, self.spec.seed, zero_head=True)

    def _adamw(self, module: nn.Module) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            [p for p in module.parameters() if p.requires_grad],
            lr=0.0,
            betas=self.config.adam_betas,
            weight_decay=self.config.weight_decay,
            fused=True,
        )

    # -- one step -----------------------------------------------------------------

    def learn(self, groups: Sequence[ScoredRollout], *, oldest: int = 0) -> StepReport:
        """One learner step; tokens of versions before `oldest` are left out of the gradient.

        Raises LearnerFailed after `max_skips` bad steps in a row.
        """
        began = time.monotonic()
        report = self.learn_from(to_experience(RolloutBatch(groups=tuple(groups))), oldest)
        metrics = {
            **report.metrics,
            **part_means(groups),
            "time/learn_compute": time.monotonic() - began,
        }
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        return replace(report, metrics=finite)

    def learn_from(self, experience: Experience, oldest: int = 0) -> StepReport:
        """One learner step on a batch of tensors; recorded where the spec says so."""
        batch = experience.to(self.device)
        prepared = prepare(
            batch,
            self.policy,
            self.reference,
            self.critic,
            self.config,
            temperature=self.spec.temperature,
            kl_coef=self.kl.coef,
            oldest=oldest,
        )
        metrics = measure(batch, prepared, version=self.version)
        metrics |= by_age(batch, prepared, self.version, self.config.clip)
        metrics["kl/coef"] = self.kl.coef
        metrics["learn/lr"] = self._rate(self.config.lr)
        reports, norms = self._optimise(batch, prepared)
        self.step += 1
        skipped = not norms
        if not skipped:
            self.version += 1
            self.kl.update(metrics["kl/ref"], len(batch))
            metrics |= _means(reports, norms)
        metrics["learn/skipped_steps"] = float(self.skips)
        self.recorder.keep(self.step, experience, oldest, self.policy, self.critic)
        return StepReport(step=self.step, version=self.version, skipped=skipped, metrics=metrics)

    def _optimise(
        self, batch: Experience, prepared: Prepared
    ) -> tuple[list[MinibatchReport], list[float]]:
        """All optimizer steps of a batch; stops at the first that is not finite."""
        reports: list[MinibatchReport] = []
        norms: list[float] = []
        for index in minibatches(len(batch), self.config, (self.spec.seed, self.step)):
            report = backward(
                batch, prepared, index, self.policy, self.critic, self.config, self.spec.temperature
            )
            norm = self._apply(report)
            if not math.isfinite(norm):
                self._skip(batch, report, norm)
                return reports, norms
            reports.append(report)
            norms.append(norm)
        self.skips_in_a_row = 0
        return reports, norms

    def _apply(self, report: MinibatchReport) -> float:
        """Clip and step both optimizers; returns the policy's gradient norm before clipping.

        Nothing is applied where a loss or a norm is not finite, and NaN comes back.
        """
        clip = self.config.grad_clip
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), clip)
        critic_norm = nn.utils.clip_grad_norm_(self.critic.parameters(), clip)
        losses = report.policy_loss + report.value_loss
        finite = math.isfinite(losses) and math.isfinite(norm) and math.isfinite(critic_norm)
        if finite:
            for optimizer, peak in (
                (self.policy_optimizer, self.config.lr),
                (self.critic_optimizer, self.config.critic_lr),
            ):
                for group in optimizer.param_groups:
                    group["lr"] = self._rate(peak)
                optimizer.step()
        self.policy_optimizer.zero_grad(set_to_none=True)
        self.critic_optimizer.zero_grad(set_to_none=True)
        return float(norm) if finite else math.nan

    def _rate(self, peak: float) -> float:
        total = max(self.spec.total_steps, self.config.warmup_steps)
        return peak * lr_factor(self.step, total, self.config.schedule, self.config.warmup_steps)

    def _skip(self, batch: Experience, report: MinibatchReport, norm: float) -> None:
        """Count a non-finite step and keep its batch; stop the run at the third in a row."""
        self.skips += 1
        self.skips_in_a_row += 1
        path = self.spec.scratch / f"nonfinite_step_{self.step + 1:06d}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in vars(batch).items()}, path)
        cause = (
            f"learner step {self.step + 1}: policy loss {report.policy_loss}, value loss "
            f"{report.value_loss}, gradient norm {norm}; the batch is kept in {path}"
        )
        log.warning("skipped a non-finite %s", cause)
        if self.skips_in_a_row >= self.config.max_skips:
            raise LearnerFailed(
                f"{self.skips_in_a_row} non-finite steps in a row; the last: {cause}. "
                "Lower learn.lr or look at the rewards of that batch"
            )

    # -- weights ------------------------------------------------------------------

    def publish(self) -> Weights:
        """Put the present policy into shared memory. Raises NonFiniteWeights."""
        return publish(
            self.policy,
            self.publisher,
            version=self.version,
            vocab=len(self.tokenizer),
            probe_tokens=self.spec.canary_tokens,
        )

    # -- state --------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write everything that a resumed learner needs below `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_module(self.policy, folder / "policy.safetensors")
        save_module(self.critic, folder / "critic.safetensors")
        save_optimizer(self.policy_optimizer, folder / "policy_optimizer.safetensors")
        save_optimizer(self.critic_optimizer, folder / "critic_optimizer.safetensors")
        state = {
            "step": self.step,
            "version": self.version,
            "kl_coef": self.kl.coef,
            "skips": self.skips,
            "skips_in_a_row": self.skips_in_a_row,
            "seed": self.spec.seed,
        }
        (folder / "learner.json").write_text(json.dumps(state, indent=1))

    def load(self, folder: Path) -> None:
        """Take up what `save` wrote. Raises StateMismatch where it is of another model."""
        load_module(self.policy, folder / "policy.safetensors")
        load_module(self.critic, folder / "critic.safetensors")
        load_optimizer(self.policy_optimizer, folder / "policy_optimizer.safetensors")
        load_optimizer(self.critic_optimizer, folder / "critic_optimizer.safetensors")
        state = json.loads((folder / "learner.json").read_text())
        self.step, self.version = state["step"], state["version"]
        self.skips, self.skips_in_a_row = state["skips"], state["skips_in_a_row"]
        if isinstance(self.kl, AdaptiveKL):
            self.kl.coef = state["kl_coef"]
        self.recorder.rewind(self.step)

    def export(self, folder: Path) -> None:
        """The policy and its tokenizer in Hugging Face format."""
        save_policy(self.policy, self.tokenizer, folder)

    def close(self) -> None:
        self.publisher.close()


def _means(reports: Sequence[MinibatchReport], norms: Sequence[float]) -> dict[str, float]:
    return {
        "loss/policy": fmean(r.policy_loss for r in reports),
        "value/loss": fmean(r.value_loss for r in reports),
        "ppo/clip_fraction": fmean(r.clip_fraction for r in reports),
        "ppo/approx_kl": fmean(r.approx_kl for r in reports),
        "value/clip_fraction": fmean(r.value_clip_fraction for r in reports),
        "grad/norm": fmean(norms),
    }


class LocalLearner:
    """The `Learner` role in one process: each call runs on a thread of its own."""

    def __init__(self, learner: PPOLearner) -> None:
        self.learner = learner

    async def learn(self, payloads: Sequence[Any], *, oldest: int = 0) -> StepReport:
        return await asyncio.to_thread(self.learner.learn, payloads, oldest=oldest)

    async def publish(self) -> Weights:
        return await asyncio.to_thread(self.learner.publish)

    async def save(self, folder: Path) -> None:
        await asyncio.to_thread(self.learner.save, folder)

    async def load(self, folder: Path) -> None:
        await asyncio.to_thread(self.learner.load, folder)

    async def export(self, folder: Path) -> None:
        await asyncio.to_thread(self.learner.export, folder)

    async def close(self) -> None:
        self.learner.close()
