"""The truths of notebook 7's patients and sealed cases, worked out by hand; their code is the notebook's own."""

from . import Death

PATIENTS = {name: Death(None, *truth, source="notebooks/07_clinic.ipynb") for name, truth in {
    # step, phase, module, operation, line, verdict
    "bad_row": (1, "data", "", "", "np.genfromtxt(FILE", "bad data"),
    "own_log": (7, "loss", "", "log", "torch.log(1 - prob)", "log of zero"),
    "constant_column": (1, "data", "", "div", "pixels[:6000].std(0)", "constant normalised"),
    "root_at_zero": (9, "backward", "", "div", ".square().sum(1).sqrt()", "infinite slope"),
    "padded_row": (3, "forward", "", "_softmax", "key_padding_mask=tokens == 0", "empty softmax row"),
    "no_labels": (6, "loss", "", "nll_loss_forward", "answers.flatten())", "mean of nothing"),
    "vae": (1, "loss", "", "exp", "logvar.exp()", "exp overflow"),
    "where_trap": (1, "backward", "", "div", "torch.where(x > 0.1, torch.log(x), x)", "where trap"),
    "half_precision": (1, "backward", "", "_to_copy", "F.cross_entropy(net(X), y)", "float16 range"),
    "adam_in_half": (1, "update", "0", "addcdiv_", "optimizer.step()", "Adam's denominator"),
    "recurrent": (1, "backward", "", "add", "cell(pixel[:, None], h)", "exploding gradient"),
    "clipped": (1, "backward", "", "div", "torch.sqrt(gate)", "infinite slope"),
    "spike": (44, "forward", "2", "addmm", "net(X * 65_535 if step == 340 else X)", "steps too long"),
    "no_bottom": (263, "forward", "4", "addmm", "net(torch.cat([real.flip(1), real]))", "float16 range"),
    "sealed_1": (2, "loss", "", "div", "points / points.norm(", "division by zero"),
    "sealed_2": (4, "loss", "", "log", "torch.log(variance)", "log of a negative"),
    "sealed_3": (1, "loss", "", "mul", "(1 - inked) * -math.inf", "zero times infinity"),
    "sealed_4": (1, "backward", "", "div", "products.abs().sqrt()", "infinite slope"),
}.items()}
