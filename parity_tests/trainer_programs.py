"""Trainers that have their own loop, for :mod:`parity_tests.programs`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from parity_tests import runs
from parity_tests.families import import_timm
from parity_tests.support import import_torchvision


class _Images(torch.utils.data.Dataset):
    """The images of an epoch in the order in which the JAX loop sees them, epoch after epoch."""

    def __init__(self, epochs: range) -> None:
        pairs = [pair for epoch in epochs for pair in runs._batches(runs.few_digits(), epoch)]
        self.images = torch.cat([images for images, _ in pairs])
        self.labels = torch.cat([labels for _, labels in pairs])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


class _WithLoss(torch.nn.Module):
    """What Hugging Face's Trainer trains: a module that returns its loss."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Any, labels: Any) -> dict[str, Any]:
        logits = self.model(pixel_values)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def hugging_face(task: str, folder: Path, on: int, back: int) -> tuple[runs.TorchRun, list[float]]:
    """Hugging Face's Trainer with its own AdamW and cosine. The run is one long epoch of its data,
    so that the images keep their order."""
    import_torchvision()
    from transformers import Trainer, TrainerCallback, TrainingArguments

    run, rates = runs.started(runs.adamw(runs.no_bias_decay), None), []
    total = runs.EPOCHS

    class Noted(TrainerCallback):
        """Notes the rates, and stops where the run is compared."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step % runs.STEPS == 0:
                rates.append(float(more["optimizer"].param_groups[0]["lr"]))

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            control.should_save = task == "begin" and state.global_step == runs.DONE * runs.STEPS
            if state.global_step == (runs.DONE + on) * runs.STEPS:
                control.should_training_stop = True

    class Ordered(Trainer):
        """Keeps the order of the images."""

        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=runs.BATCH,
        max_steps=total * runs.STEPS,
        learning_rate=0.004,
        weight_decay=0.03,
        lr_scheduler_type="cosine",
        warmup_steps=3,
        logging_steps=2,
        max_grad_norm=0.2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        ignore_data_skip=False,
    )
    model = _WithLoss(run.model)
    trainer = Ordered(model, arguments, train_dataset=_Images(range(total)), callbacks=[Noted()])
    trainer.train(resume_from_checkpoint=_written_back(folder) if task == "resume" else None)
    return run, rates[-(on if task == "begin" else back) :]


def _written_back(folder: Path) -> str:
    """A folder of the Trainer with what came back: its own, with other weights and states."""
    from safetensors.torch import save_file

    saved = next(folder.glob("checkpoint-*"))
    came = torch.load(folder / "back.pth", weights_only=True)
    made = saved.with_name(f"checkpoint-{came['step']}")
    made.mkdir()
    for file in saved.iterdir():
        (made / file.name).write_bytes(file.read_bytes())
    save_file({f"model.{key}": v for key, v in came["model"].items()}, made / "model.safetensors")
    torch.save(came["optimizer"], made / "optimizer.pt")
    torch.save(came["lr_scheduler"], made / "scheduler.pt")
    state = (made / "trainer_state.json").read_text()
    old = f'"global_step": {runs.DONE * runs.STEPS}'
    assert old in state
    (made / "trainer_state.json").write_text(state.replace(old, f'"global_step": {came["step"]}'))
    return str(made)


def timm(task: str, folder: Path, on: int, back: int) -> tuple[runs.TorchRun, list[float]]:
    """timm's optimizer, schedule, average and CheckpointSaver, as its script uses them."""
    import_timm()
    from timm.models import resume_checkpoint
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler
    from timm.utils import CheckpointSaver, ModelEmaV3

    arguments = Namespace(
        model="resnet8",
        sched="cosine",
        epochs=runs.EPOCHS,
        warmup_epochs=3,
        warmup_lr=1e-4,
        min_lr=1e-4,
        batch_size=runs.BATCH,
        smoothing=0.0,
    )
    run = runs.started(
        lambda model: create_optimizer_v2(model, "adamw", lr=0.004, weight_decay=0.03), None
    )
    average = ModelEmaV3(run.model, decay=0.9)
    scheduler, _ = create_scheduler(arguments, run.optimizer)
    saver = CheckpointSaver(
        run.model, run.optimizer, arguments, average, checkpoint_dir=str(folder)
    )
    if task == "resume":
        came = torch.load(folder / "back.pth", weights_only=True)
        file = {"state_dict": came["model"], "optimizer": came["optimizer"], "version": 2}
        torch.save({**file, "epoch": came["epoch"]}, folder / "file.pth.tar")
        run.epoch = resume_checkpoint(run.model, str(folder / "file.pth.tar"), run.optimizer) or 0
    rates: list[float] = []
    scheduler.step(run.epoch)
    for epoch in range(run.epoch, runs.DONE + on):
        rates.append(float(run.optimizer.param_groups[0]["lr"]))
        run.epochs(1, after_step=lambda: average.update(run.model, step=run.step))
        if task == "begin" and epoch == runs.DONE - 1:
            saver.save_checkpoint(epoch, metric=0.5)
            (folder / f"checkpoint-{epoch}.pth.tar").rename(folder / "saved.pth.tar")
        scheduler.step(epoch + 1)
    if task == "begin":
        torch.save(average.module.state_dict(), folder / "average.pth")
    return run, rates[-(on if task == "begin" else back) :]


def mmengine(task: str, folder: Path, on: int, back: int) -> tuple[runs.TorchRun, list[float]]:
    """MMEngine's Runner, with two schedules by epoch."""
    import_torchvision()
    from mmengine.hooks import Hook
    from mmengine.model import BaseModel
    from mmengine.optim import LinearLR, MultiStepLR, OptimWrapper
    from mmengine.runner import Runner

    run = runs.started(runs.momentum_sgd(lambda model: model.parameters()), None)
    rates: list[float] = []

    class Model(BaseModel):
        """The same network as one of MMEngine's."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone = run.model

        def forward(self, inputs: Any, labels: Any, mode: str = "loss") -> Any:
            return {"loss": torch.nn.functional.cross_entropy(self.backbone(inputs), labels)}

    class Noted(Hook):
        """Notes the rates."""

        def before_train_epoch(self, runner: Any) -> None:
            rates.append(float(run.optimizer.param_groups[0]["lr"]))

    class Batches(runs.CountedBatches):
        """The batches under the names of the model's arguments."""

        def __iter__(self) -> Any:
            for images, labels in super().__iter__():
                yield {"inputs": images, "labels": labels}

    data = Batches(0)
    runner = Runner(
        model=Model(),
        work_dir=str(folder),
        train_dataloader=torch.utils.data.DataLoader(data, batch_size=None),
        train_cfg={"by_epoch": True, "max_epochs": runs.DONE + on},
        optim_wrapper=OptimWrapper(run.optimizer),
        param_scheduler=[
            LinearLR(run.optimizer, start_factor=0.5, begin=0, end=3),
            MultiStepLR(run.optimizer, milestones=[1, 3], gamma=0.3, begin=1, end=5),
        ],
        default_hooks={
            "checkpoint": {"type": "CheckpointHook", "interval": runs.DONE},
            "sampler_seed": None,
        },
        default_scope="mmengine",
    )
    runner.register_hook(Noted())
    if task == "resume":
        came = torch.load(folder / "back.pth", weights_only=True)
        torch.save(
            {
                "meta": {"epoch": came["epoch"] + 1, "iter": came["step"]},
                "state_dict": {f"backbone.{key}": v for key, v in came["model"].items()},
                "message_hub": runner.message_hub.state_dict(),
                "optimizer": came["optimizer"],
                "param_schedulers": came["lr_scheduler"]["param_schedulers"],
            },
            folder / "resume.pth",
        )
        data.epoch = came["epoch"] + 1
        runner.resume(str(folder / "resume.pth"))
    runner.train()
    return run, rates[-(on if task == "begin" else back) :]
