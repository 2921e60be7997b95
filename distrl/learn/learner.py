"""The learner: owns the policy, the critic and their optimizers, in one process.

`PolicyLearner` is plain and synchronous; the Ray actor of the `Learner` role forwards to it.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from distrl.algo import AdaptivePenalty, lr_factor
from distrl.data.tokenizer import load_tokenizer
from distrl.learn.average import WeightAverage
from distrl.learn.experience import Experience, to_experience
from distrl.learn.leash import leash, plan_leash, resume_leash
from distrl.learn.measure import by_age, measure, part_means
from distrl.learn.networks import Networks
from distrl.learn.opening import Opening, read_opening
from distrl.learn.optimizer import optimizer_for, set_rate
from distrl.learn.prepare import Prepared, prepare
from distrl.learn.pretrain import Examples
from distrl.learn.ranks import ALONE, Ranks
from distrl.learn.record import SMALL, Recorder
from distrl.learn.spec import LearnerSpec
from distrl.learn.state import load_module, load_optimizer, save_module, save_optimizer
from distrl.learn.update import MinibatchReport, Prices, Update, minibatches, pretrain_backward
from distrl.models.crew import Crew
from distrl.models.heads import ScalarModel
from distrl.models.load import best_device, save_policy
from distrl.records import Float32s, Int32s, RolloutBatch, ScoredRollout, StepReport, Weights
from distrl.roles import LearnerFailed
from distrl.sync.canary import probe_ids, publish
from distrl.sync.memory import Bystander, SharedMemoryPublisher, whole

log = logging.getLogger(__name__)

AVERAGE = "average.safetensors"

WRITERS = 8
"""Threads that copy a GPU's weights into memory, where one is slower than the way from the GPU."""


class PolicyLearner:
    """Policy optimisation as the `learn` section composes it. Not thread-safe: one call at a
    time."""

    def __init__(self, spec: LearnerSpec) -> None:
        self.spec, self.config = spec, spec.config
        self.device = best_device() if spec.config.gpus else torch.device("cpu")
        self.ranks = _ranks(spec, self.device)
        self.tokenizer = load_tokenizer(spec.policy)
        self.networks = Networks.load(
            spec.policy,
            spec.reward_model,
            spec.config,
            seed=spec.seed,
            device=self.device,
            ranks=self.ranks,
        )
        self.optimizers = [optimizer_for(part, spec.config) for part in self.networks.trained]
        self.update = Update(
            networks=self.networks,
            config=spec.config,
            temperature=spec.temperature,
            longest=spec.longest,
            ranks=self.ranks,
        )
        self.kl = leash(spec.config, spec.total_samples)
        self.penalty = AdaptivePenalty(
            spec.config.objective.penalty, spec.config.objective.penalty_target or 1.0
        )
        self.average = (
            WeightAverage(self.networks.trained[0], spec.config.ema)
            if spec.config.ema is not None
            else None
        )
        self.pretrain = Examples.load(spec.pretrain) if spec.pretrain is not None else None
        self.publisher = (
            SharedMemoryPublisher(spec.threads or WRITERS) if self.ranks.first else Bystander()
        )
        self.recorder = self._new_recorder()
        self.plan(spec.total_steps)
        self.step = 0
        self.version = 0
        self.skips = 0
        self.skips_in_a_row = 0

    @property
    def policy(self) -> Any:
        return self.networks.policy.model

    @property
    def critic(self) -> ScalarModel | None:
        return self.networks.critic

    def _new_recorder(self) -> Recorder:
        wanted = self.config.record
        if wanted is None:
            small = sum(p.numel() for p in self.policy.parameters()) <= SMALL
            wanted = small and self.config.replayable
        folder = self.spec.recording if self.ranks.first else None
        return Recorder(folder, int(self.config.record_mib * 2**20), on=wanted)

    def plan(self, total_steps: int) -> None:
        """Let schedules take their course over so many steps: the policy's, and a linear leash's,
        over those that the critic's warm-up leaves."""
        self.total_steps = total_steps
        learning = max(total_steps - self.config.value.warmup_steps, 1)
        plan_leash(self.kl, learning * self.spec.total_samples // self.spec.total_steps)

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
        opening = self._open(batch)
        prepared = prepare(
            batch,
            self.networks,
            self.config,
            temperature=self.spec.temperature,
            kl_coef=self.kl.coef,
            version=self.version,
            oldest=oldest,
            opening=opening,
            ranks=self.ranks,
        )
        metrics = measure(batch, prepared, self.config, version=self.version)
        metrics |= by_age(batch, prepared, self.config, version=self.version)
        metrics["kl/coef"] = self.kl.coef
        metrics["learn/lr"] = self._policy_rate() if self._policy_learns else 0.0
        steps = self._optimise(batch, prepared, opening)
        if steps:
            metrics |= self._summary(steps) | self._penalty(batch, prepared)
            self.version += 1
            if self.config.kl.used and self._policy_learns:
                self.kl.update(metrics["kl/ref"], len(batch))
            if self.average is not None:
                self.average.update()
        self.step += 1
        metrics["learn/skipped_steps"] = float(self.skips)
        self.recorder.keep(self.step, self.total_steps, experience, oldest, *self.networks.trained)
        return StepReport(step=self.step, version=self.version, skipped=not steps, metrics=metrics)

    def _penalty(self, batch: Experience, prepared: Prepared) -> dict[str, float]:
        """The price of leaving the policy from before the step, where there is one; moved by how
        far the step went."""
        settings = self.config.objective
        if settings.kind != "kl_penalty":
            return {}
        metrics = {"ppo/penalty": self.penalty.coef}
        if settings.penalty_target is not None and self._policy_learns:
            metrics["ppo/moved"] = self.update.moved(batch, prepared)
            self.penalty.update(metrics["ppo/moved"])
        return metrics

    def _summary(self, steps: Sequence[_Step]) -> dict[str, float]:
        """Means over a learner step's optimizer steps."""
        reports = [step.report for step in steps]
        metrics = {
            "loss/policy": fmean(r.policy_loss for r in reports),
            "ppo/clip_fraction": fmean(r.clip_fraction for r in reports),
            "ppo/approx_kl": fmean(r.approx_kl for r in reports),
            "grad/norm": fmean(step.norm for step in steps),
            "learn/optimizer_steps": float(len(steps)),
            "learn/padding": fmean(r.padding for r in reports),
        }
        if self.critic is not None:
            metrics["value/loss"] = fmean(r.value_loss for r in reports)
            metrics["value/clip_fraction"] = fmean(r.value_clip_fraction for r in reports)
        if self.pretrain is not None and self._policy_learns:
            metrics["loss/pretrain"] = fmean(step.pretrain_loss for step in steps)
        return metrics

    def _open(self, batch: Experience) -> list[Opening]:
        """The first minibatch's passes, where its policy learns and its way back is this process's
        own affair."""
        if self.ranks.world > 1 or not self._policy_learns:
            return []
        return read_opening(
            batch,
            next(minibatches(len(batch), self.config, (self.spec.seed, self.step))),
            self.networks,
            self.spec.temperature,
            self.config.micro_tokens,
            self.ranks,
        )

    @property
    def _policy_learns(self) -> bool:
        return self.step >= self.config.value.warmup_steps

    def _optimise(
        self, batch: Experience, prepared: Prepared, opening: list[Opening]
    ) -> list[_Step]:
        """The optimizer steps of a batch; none after the first that is not finite, or (where
        `target_kl` is set) that would set out from too far away."""
        steps: list[_Step] = []
        far = self.config.objective.target_kl or math.inf
        prices = Prices(
            kl=self.kl.coef if self.config.kl.place == "loss" else 0.0,
            penalty=self.penalty.coef,
            policy_learns=self._policy_learns,
        )
        for index in minibatches(len(batch), self.config, (self.spec.seed, self.step)):
            report = self.update.backward(batch, prepared, index, prices, opening)
            opening = []  # of the weights before this step
            if steps and report.approx_kl > far:
                self._forget_gradients()
                break
            pretrain_loss = self._pretrain(len(steps)) if prices.policy_learns else 0.0
            norm = self._apply(report, pretrain_loss, policy_learns=prices.policy_learns)
            if not math.isfinite(norm):
                self._skip(batch, report, norm)
                return steps
            steps.append(_Step(report=report, norm=norm, pretrain_loss=pretrain_loss))
        self.skips_in_a_row = 0
        return steps

    def _pretrain(self, place: int) -> float:
        """PPO-ptx: the gradient of the step's own examples; their loss, nats a token."""
        if self.pretrain is None:
            return 0.0
        settings = self.config.pretrain
        turn = self.step * self.config.epochs * self.config.minibatches + place
        examples = self.pretrain.turn(turn, settings.sequences)
        return pretrain_backward(
            self.networks,
            examples,
            settings.coef,
            self.config.micro_tokens,
            self.ranks,
            self.device,
        )

    def _apply(
        self, report: MinibatchReport, pretrain_loss: float, *, policy_learns: bool
    ) -> float:
        """Clip and step the optimizers; returns the policy's gradient norm before clipping: 0 while
        it does not learn, though a critic on its body leaves a gradient there.

        Nothing is applied where a loss or a norm is not finite, and NaN comes back.
        """
        config = self.config
        clip = config.grad_clip or math.inf
        crew = self.ranks.crew
        norms = crew.run(
            lambda part: whole(nn.utils.clip_grad_norm_(part.parameters(), clip)).item(),
            self.networks.trained,
        )
        losses = report.policy_loss + report.value_loss + pretrain_loss
        finite = math.isfinite(losses) and all(map(math.isfinite, norms))
        if finite:
            rates = (self._policy_rate() if policy_learns else None, self._rate(config.critic_lr))
            due = zip(self.optimizers, rates, strict=False)
            crew.run(_descend, [(each, rate) for each, rate in due if rate is not None])
        self._forget_gradients()
        if not finite:
            return math.nan
        return norms[0] if policy_learns else 0.0

    def _forget_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _policy_rate(self) -> float:
        return self._rate(self.config.lr, after=self.config.value.warmup_steps)

    def _rate(self, peak: float, after: int = 0) -> float:
        """The present rate of a network that learns from step `after` on."""
        config = self.config
        total = max(self.total_steps - after, config.warmup_steps, 1)
        return peak * lr_factor(
            max(self.step - after, 0),
            total,
            config.schedule,
            config.warmup_steps,
            config.schedule_floor,
        )

    def _skip(self, batch: Experience, report: MinibatchReport, norm: float) -> None:
        """Count a non-finite step and keep its batch; stop the run at the third in a row."""
        self.skips += 1
        self.skips_in_a_row += 1
        cause = (
            f"learner step {self.step + 1}: policy loss {report.policy_loss}, value loss "
            f"{report.value_loss}, gradient norm {norm}; the batch is {self._keep(batch)}"
        )
        log.warning("skipped a non-finite %s", cause)
        if self.skips_in_a_row >= self.config.max_skips:
            raise LearnerFailed(
                f"{self.skips_in_a_row} non-finite steps in a row; the last: {cause}. "
                "Lower learn.lr or look at the rewards of that batch"
            )

    def _keep(self, batch: Experience) -> str:
        """Write the batch of a non-finite step to where it can be looked at; what came of it."""
        path = self.spec.scratch / f"nonfinite_step_{self.step + 1:06d}.safetensors"
        if self.ranks.first:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file({k: v.contiguous() for k, v in vars(batch).items()}, path)
            except (OSError, SafetensorError) as error:  # a full disk, say: the run goes on
                return f"lost ({error})"
        return f"kept in {path}"

    # -- weights ------------------------------------------------------------------

    def publish(self) -> Weights:
        """Put the present policy into shared memory. Raises NonFiniteWeights."""
        return publish(
            self.networks.checkpoint_state(),
            self.publisher,
            version=self.version,
            transport=self.spec.transport,
            probe=probe_ids(len(self.tokenizer), self.spec.canary_tokens),
            read=self._read_probe,
            together=self.ranks.crew.together,
        )

    def compile_probe(self) -> None:
        """Read the probe, so that what is compiled for it is so before a publication is waited
        for (`sync.timeout_s`): that takes a minute or two on a busy machine."""
        self._read_probe(probe_ids(len(self.tokenizer), self.spec.canary_tokens))

    @torch.no_grad()
    def _read_probe(self, probe: Int32s) -> Float32s:
        """[K-1]: log p(probe[1:]), nats, at temperature 1."""
        ids = torch.from_numpy(probe).long().to(self.device)
        everywhere = torch.ones((1, len(ids) - 1), dtype=torch.bool, device=self.device)
        _, logprobs, _ = self.networks.policy(ids[None, :-1], everywhere, ids[1:])
        return logprobs.cpu().numpy()

    # -- state --------------------------------------------------------------------

    def save(self, folder: Path) -> list[Path]:
        """Write everything that a resumed learner needs below `folder`. Returns this rank's
        files."""
        folder.mkdir(parents=True, exist_ok=True)
        files: list[Path] = []
        for name, part, optimizer in self._parts():
            files += [
                save_module(part, folder / f"{name}.safetensors", self.ranks),
                save_optimizer(optimizer, folder / f"{name}_optimizer.safetensors", self.ranks),
            ]
        if self.average is not None:
            files.append(self.average.save(folder / AVERAGE, self.ranks))
        if not self.ranks.first:
            return files
        state = {
            "step": self.step,
            "version": self.version,
            "kl": asdict(self.kl),
            "penalty": self.penalty.coef,
            "skips": self.skips,
            "skips_in_a_row": self.skips_in_a_row,
            "seed": self.spec.seed,
        }
        (folder / "learner.json").write_text(json.dumps(state, indent=1))
        return [*files, folder / "learner.json"]

    def load(self, folder: Path) -> None:
        """Take up what `save` wrote. Raises StateMismatch where it is of another model."""
        for name, part, optimizer in self._parts():
            load_module(part, folder / f"{name}.safetensors")
            load_optimizer(optimizer, folder / f"{name}_optimizer.safetensors")
        if self.average is not None:
            self.average.load(folder / AVERAGE)
        state = json.loads((folder / "learner.json").read_text())
        self.step, self.version = state["step"], state["version"]
        self.skips, self.skips_in_a_row = state["skips"], state["skips_in_a_row"]
        resume_leash(self.kl, state["kl"])
        self.penalty.coef = state["penalty"]
        self.recorder.rewind(self.step)

    def export(self, folder: Path) -> None:
        """The policy and its tokenizer in Hugging Face format: the average of its weights where
        `learn.ema` asks for one; beside it, which step and version it is of."""
        with nullcontext() if self.average is None else self.average.in_place():
            state: dict[str, Tensor] = {}
            for name, weight in self.networks.policy_state().items():
                found = whole(weight)  # every rank has to ask; one keeps it
                if self.ranks.first:
                    state[name] = found.cpu()
            if self.ranks.first:
                meta = {"step": self.step, "version": self.version}
                save_policy(self.policy, self.tokenizer, folder, state=state, meta=meta)

    def close(self) -> None:
        self.publisher.close()
        self.ranks.crew.close()
        self.ranks.leave()

    def _parts(self) -> Iterator[tuple[str, nn.Module, torch.optim.Optimizer]]:
        """What learns, under the name that its files have."""
        yield from zip(("policy", "critic"), self.networks.trained, self.optimizers, strict=False)


def _descend(due: tuple[torch.optim.Optimizer, float]) -> None:
    optimizer, rate = due
    set_rate(optimizer, rate)
    optimizer.step()


def _ranks(spec: LearnerSpec, device: torch.device) -> Ranks:
    """Who shares the work: other processes, or threads of this one."""
    if spec.place is None:
        return ALONE if spec.threads is None else Ranks(crew=Crew.of_cores(spec.threads))
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    return Ranks.join(spec.place, device)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """One optimizer step; `norm` of the policy's gradient before clipping."""

    report: MinibatchReport
    norm: float
    pretrain_loss: float
