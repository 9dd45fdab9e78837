"""Which finder leads to the place where a NaN was born? Four of them on each death of tests/nan_cases.

    python tests/benchmarks/finders.py                                all deaths: a table, then counts; half a minute
    python tests/benchmarks/finders.py --cases where_trap wgan_gp     some of them
    python tests/benchmarks/finders.py --json results/finders.json    with what each finder said

    whynan                   `with whynan.watch():` around the loop: step, phase, module, line
    detect_anomaly           torch.autograd.detect_anomaly(): a node of backward, the line of its forward call
    DebugUnderflowOverflow   of transformers, where that is installed: a module, and what of it is bad
    first_nonfinite          this series' own until whynan came, with a loop of its own: step, phase, layer

    right                    the step that is named, or in which the run is stopped, the phase and the place
    right line, wrong phase  the step and the place, be it a line or a module; else "wrong", or "silent"
    can't be used            it crashes, or wants another kind of loop; the record has the reason
"""

import argparse
import collections
import contextlib
import copy
import functools
import inspect
import io
import pathlib
import re
import subprocess
import sys
import types
import warnings

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
sys.path.insert(1, str(pathlib.Path(__file__).resolve().parents[1]))
import nan_cases

import helpers
import whynan

try:
    import transformers
    from transformers.debug_utils import DebugUnderflowOverflow
except ImportError:
    transformers = None

GRADES = "right", "right line, wrong phase", "wrong", "silent", "can't be used"
FORMER = "eb62af1:helpers.py"  # where first_nonfinite was last
ITSELF = "(the network itself)"  # in a truth, "" is that in the forward phase, and else what is outside of all modules
# Of the bad weight the truth has the line that loads it; the other two are in a network's own forward.
ALSO_RIGHT = {"nan_in_a_checkpoint": "up", "long_padding": ITSELF, "clipped_infinity": ITSELF}
STEPS = collections.Counter()  # of each optimizer: a finder that names none may stop the run in the right one
# module, line: None where none is named; input_is_bad: that of the module
Answer = collections.namedtuple("Answer", "step phase module line says input_is_bad", defaults=[False])


class Unusable(Exception):
    """Of this case a finder can't be asked; the text is the reason."""


def ask_whynan(name, death):
    try:
        with whynan.watch():
            death.run(cured=False)
    except whynan.NonFiniteError as error:
        return Answer(error.step, error.phase, error.module, error.line.text if error.line else "", str(error))


class LastLoss(TorchFunctionMode):
    """Keeps the last scalar until its backward: detect_anomaly looks only there, and many a loop ends before."""
    loss = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.backward:
            self.loss = None
        elif isinstance(result, torch.Tensor) and not result.dim() and result.requires_grad:
            self.loss = result
        return result


def ask_anomaly(name, death):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with torch.autograd.detect_anomaly(check_nan=True):
                with LastLoss() as last:
                    death.run(cured=False)
                if last.loss is not None and not last.loss.isfinite():
                    last.loss.backward()  # its user would take the loop's own check out
        except RuntimeError as error:
            if "returned nan values" not in str(error):
                raise
            text = next(str(w.message) for w in caught if "Traceback of forward call that caused" in str(w.message))
            lines = re.findall(r'File ".*nan_cases.*", line \d+, in .*\n\s*(.*)', text)
            return Answer(max(STEPS.values(), default=0) + 1, "backward", None, ["", *lines][-1], str(error))


def read_frames(printed):
    """What DebugUnderflowOverflow prints, as a reader takes it who thinks one step further."""
    step = max(STEPS.values(), default=0) + 1
    module = re.findall(r"^ {18}(?!\*)(.*) \S+$", printed, re.MULTILINE)[-1] or ITSELF
    bad = list(dict.fromkeys(re.findall(r"^(\S+) has (?:nan|inf)s$", printed, re.MULTILINE)))
    says = f"{module}: {', '.join(bad)}"
    if all(name.startswith(("input", "output")) for name in bad):
        return Answer(step, "forward", module, None, says, input_is_bad=bad[0].startswith("input"))
    # a weight is bad as the batch begins: it came so, or the step before made it so
    return Answer(step - 1, "update", module, None, says) if step > 1 else Answer(step, "data", module, None, says)


def ask_transformers(name, death):
    if transformers is None:
        raise Unusable("not installed")
    known = set()

    def attach(module, args):
        if module not in known and next(module.parameters(), None) is not None:
            known.update(module.modules())
            DebugUnderflowOverflow(module)

    with contextlib.redirect_stdout(io.StringIO()) as printed, register_module_forward_pre_hook(attach):
        try:
            death.run(cured=False)
        except ValueError as error:
            if "DebugUnderflowOverflow" not in str(error):
                raise
            return read_frames(printed.getvalue())
    if not known:
        raise Unusable("there is no module")


# The loops that first_nonfinite can make: the loss, of the network's output and y, and y, by the names that the owner's
# loop has for them. The network, what it is given, and the optimizer are taken from a run.
LOOPS = {
    "nan_in_a_row": ("criterion", "tumour"), "where_trap": ("F.cross_entropy", "word"),
    "padded_cloud": ("F.cross_entropy", "kind"), "adadelta_lr_for_sgd": ("F.nll_loss", "target"),
    "focal_gamma_below_one": ("criterion", "target"), "nan_in_a_checkpoint": ("F.cross_entropy", "classes"),
    "log_of_silence": ("F.mse_loss", "syllables[i:i + 4]"), "regression_lr": ("lambda x, y: (x - y).pow(2).sum()", "b"),
    "rmse_of_an_exact_batch": ("criterion", "gauges.sum(1, keepdim=True)"), "cubes_of_prices": ("F.mse_loss", "y"),
    "dry_month": ("criterion", "weather[:, :2].sum(1, keepdim=True)"), "kl_of_a_class_without_votes": ("kl", "p"),
    "inf_in_a_label": ("lambda x, y: F.l1_loss(x.squeeze(1), y)", "batch['disparity']"),
    "summed_in_half": ("lambda x, y: F.mse_loss(x.half(), y, reduction='sum')", "6 + 2 * image"),
    "log_of_a_softmax": ("lambda x, y: -(y * torch.log(F.softmax(x, -1))).sum(-1).mean()", "labels[i:i + 16]"),
    "log_of_a_sure_sigmoid": ("lambda p, y: -torch.mean(y * torch.log(p) + (1 - y) * torch.log(1 - p))", "y"),
    "masked_mean_late": ("lambda x, y: distillation(x, y[0, ..., 0], y[1])",
                         "torch.stack((labels[..., None].expand_as(teacher), teacher))"),
    "angle_of_equals": ("lambda x, y: angle_between(y[0] @ rotation(x / 10), y[1], None).mean()",
                        "torch.stack((pose, target))"),
    "ctc_long_label": ("lambda x, y: F.ctc_loss(x, y[:, 1:], torch.full((len(y),), len(x)), y[:, 0])",
                       "torch.cat((lengths[:, None], digits), 1)"),
}
NO_LOOP = {
    "empty_sentence vanished_eps adam_in_half relu_rnn long_padding": "whole numbers given, which have no gradient",
    "left_padding padded_graphs mask_times_infinity all_labels_ignored clipped_infinity": "more than one tensor given",
    "vae_logvar gaussian_nll mixture_density pose_from_identity one_step_episode": "more than one tensor comes out",
    "siamese_twins contrastive_not_normalised minibatch_std": "the network is called twice a step",
    "dry_week_standardised wgan_gp": "two networks", "normalised_silence": "a weight outside of the network",
    "no_edges": "gradients are accumulated", "loss_scale": "gradients are scaled back before the step",
    "lbfgs_closure": "the step wants a closure", "polynomial_by_hand": "there is no module",
}


@functools.cache
def former_helpers():
    """helpers.py as it was when first_nonfinite was in it."""
    try:
        text = subprocess.run(["git", "show", FORMER], cwd=helpers.HERE, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # no git, or a copy without its history
        raise Unusable("not here") from None
    module = sys.modules["former_helpers"] = types.ModuleType("former_helpers")  # pydantic looks for it there
    module.__file__ = helpers.__file__
    exec(compile(text, FORMER, "exec"), vars(module))
    return module


def ask_former(name, death):
    first_nonfinite, nets, batches, given = former_helpers().first_nonfinite, [], [], {}
    if name not in LOOPS:
        raise Unusable(next((reason for names, reason in NO_LOOP.items() if name in names.split()), "not tried"))

    def take(module, args):
        if not nets and next(module.parameters(), None) is not None:
            nets.extend((module, copy.deepcopy(module)))  # as it is before the first step
        if module in nets:
            frame = next(called.frame for called in inspect.stack(0) if "nan_cases" in called.filename)
            names = frame.f_globals | frame.f_locals
            given["loss_fn"], y = (eval(text, names) for text in LOOPS[name])
            given["optimizer"] = names["optimizer"] if "optimizer" in names else names["self"].optimizer
            batches.append((args[0].detach().clone(), y.detach().clone()))

    with register_module_forward_pre_hook(take):
        death.run(cured=False)
    kind, shape = type(given["optimizer"]), batches[0][0].shape[1:]
    settings = {k: v for k, v in given["optimizer"].defaults.items() if k in inspect.signature(kind).parameters}
    lr, given["optimizer"] = settings.pop("lr"), functools.partial(kind, **settings)
    if len(shape) != 3:  # it takes images only: the network gets what they are made of
        nets[1].register_forward_pre_hook(lambda module, args: args[0].reshape(-1, *shape))
        batches = [(X.reshape(len(X), -1, 1, 1), y) for X, y in batches]
    found = first_nonfinite(nets[1], batches, lr, max_steps=len(batches), precision="float32", **given)
    if found:
        phase = "data" if found.layer == "input" else found.phase
        return Answer(found.step, phase, "" if phase in ("data", "loss") else found.layer or ITSELF, None, str(found))


FINDERS = {"whynan": ask_whynan, "detect_anomaly": ask_anomaly, "DebugUnderflowOverflow": ask_transformers,
           "first_nonfinite": ask_former}


def ask(finder, name, death):
    """What the record has of a finder's answer."""
    STEPS.clear()
    try:
        with register_optimizer_step_post_hook(lambda optimizer, *_: STEPS.update([optimizer])):
            answer = FINDERS[finder](name, death)
    except Exception as error:  # of whatever it dies
        return {"grade": "can't be used", "reason": f"{type(error).__name__}: {error}".removeprefix("Unusable: ")}
    if answer is None:
        return {"grade": "silent"}
    places = {None, death.module, ALSO_RIGHT.get(name)} | ({ITSELF} if death[2:4] == ("forward", "") else set())
    placed, phase = answer.module in places, answer.phase
    if answer.input_is_bad and death.phase in ("forward", "data"):  # then what calls the module is meant, or the batch
        placed, phase = placed or not death.module or answer.module.startswith(death.module + "."), death.phase
    if answer.step != death.step or not placed or (answer.line is not None and death.line not in answer.line):
        return {"grade": "wrong", **answer._asdict()}
    return {"grade": "right" if phase == death.phase else "right line, wrong phase", **answer._asdict()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=nan_cases.DEATHS, default=[*nan_cases.DEATHS], metavar="CASE")
    parser.add_argument("--json", default="", help="file for the results")
    options = parser.parse_args()
    try:
        helpers.check_parameters(results_path=options.json)
    except ValueError as error:
        parser.error(str(error))
    warnings.simplefilter("ignore")  # torch warns of some deaths, in the middle of the table
    versions = {"transformers": transformers.__version__ if transformers else "not installed"}
    for name, value in (helpers.environment() | versions).items():
        print(f"{name:12s} {value}")
    print("\n" + " ".join(f"{title:28s}" for title in ("death", *FINDERS)).rstrip())
    rows = {}
    for name in dict.fromkeys(options.cases):
        death = nan_cases.DEATHS[name]
        answers = {finder: ask(finder, name, death) for finder in FINDERS}
        shown = (a["reason"] if a.get("reason", "").startswith("not ") else a["grade"] for a in answers.values())
        print(" ".join(f"{text:28s}" for text in (name, *shown)).rstrip(), flush=True)
        rows[name] = {"truth": {key: getattr(death, key) for key in death._fields[1:6]}, **answers}
    counts = {finder: collections.Counter(row[finder]["grade"] for row in rows.values()) for finder in FINDERS}
    print()
    for finder, count in counts.items():
        print(f"{finder:28s} " + ", ".join(f"{count[kind]} {kind}" for kind in GRADES if count[kind]))
    helpers.save_results(options.json, {"counts": counts, "deaths": rows, "versions": versions})


if __name__ == "__main__":
    main()
