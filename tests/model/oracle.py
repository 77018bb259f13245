"""An independent re-derivation of SiT and REPA, written from the paper's formulas for tests.

Everything is spelt out on a dict of tensors, one sample and one head at a time: slow, and with no
code in common with the engine. Runs in whatever dtype the tensors have (float64 is the truth).
"""

import math

import torch


def linear(s, name, x):
    return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def standardise(x, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)


def position_embedding(width, side):
    rows = []
    for row in range(side):
        for column in range(side):
            values = []
            for position in (column, row):
                angles = [position * 10000 ** (-k / (width / 4)) for k in range(width // 4)]
                values += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            rows.append(values)
    return torch.tensor(rows, dtype=torch.float64)


def patchify(x, patch):
    """Cut [C,S,S] -> [T, C*p*p], the layout of a convolution's weight."""
    side = x.shape[-1] // patch
    return torch.stack(
        [
            x[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].reshape(-1)
            for i in range(side)
            for j in range(side)
        ]
    )


def time_features(t):
    exponents = torch.arange(128, dtype=torch.float64) / 128
    frequencies = torch.exp(-math.log(10000) * exponents).to(t)
    return torch.cat([torch.cos(t * frequencies), torch.sin(t * frequencies)])


def attention(s, name, x, heads):
    width = x.shape[1]
    d = width // heads
    qkv = linear(s, f"{name}.qkv", x)
    out = []
    for h in range(heads):
        q, k, v = (qkv[:, part * width + h * d : part * width + (h + 1) * d] for part in range(3))
        if f"{name}.q_norm.weight" in s:
            q = standardise(q, 1e-5) * s[f"{name}.q_norm.weight"] + s[f"{name}.q_norm.bias"]
            k = standardise(k, 1e-5) * s[f"{name}.k_norm.weight"] + s[f"{name}.k_norm.bias"]
        scores = q @ k.T / math.sqrt(d)
        weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
        out.append(weights / weights.sum(-1, keepdim=True) @ v)
    return linear(s, f"{name}.proj", torch.cat(out, dim=1))


def velocity_and_hidden(s, x, t, label, *, heads, patch, block):
    """One sample: x [C,S,S], t scalar, label int -> velocity [C,S,S], hidden [T,D]."""
    channels, side = x.shape[0], x.shape[-1] // patch
    width = s["pos_embed"].shape[-1]
    kernel = s["x_embedder.proj.weight"].reshape(width, -1)
    h = patchify(x, patch) @ kernel.T + s["x_embedder.proj.bias"] + s["pos_embed"][0]
    time = linear(s, "t_embedder.mlp.2", silu(linear(s, "t_embedder.mlp.0", time_features(t))))
    c = time + s["y_embedder.embedding_table.weight"][label]
    hidden = None
    depth = 1 + max(int(k.split(".")[1]) for k in s if k.startswith("blocks."))
    for i in range(depth):
        name = f"blocks.{i}"
        m = linear(s, f"{name}.adaLN_modulation.1", silu(c)).reshape(6, width)
        y = standardise(h, 1e-6) * (1 + m[1]) + m[0]
        h = h + m[2] * attention(s, f"{name}.attn", y, heads)
        y = standardise(h, 1e-6) * (1 + m[4]) + m[3]
        h = h + m[5] * linear(s, f"{name}.mlp.fc2", gelu_tanh(linear(s, f"{name}.mlp.fc1", y)))
        if i + 1 == block:
            hidden = h
    m = linear(s, "final_layer.adaLN_modulation.1", silu(c)).reshape(2, width)
    tokens = linear(s, "final_layer.linear", standardise(h, 1e-6) * (1 + m[1]) + m[0])
    image = torch.empty(channels, side * patch, side * patch, dtype=x.dtype)
    for token, values in enumerate(tokens):
        i, j = divmod(token, side)
        square = values.reshape(patch, patch, channels)  # the channel last
        for ch in range(channels):
            image[ch, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] = square[:, :, ch]
    return image, hidden


def unit(x):
    return x / torch.clamp(torch.sqrt((x**2).sum(-1, keepdim=True)), min=1e-12)


def alignment(s, hiddens, targets):
    """-(1/(E B)) sum over encoders and samples of the mean cosine over tokens."""
    total = 0
    for k, target in enumerate(targets):
        for hidden, wanted in zip(hiddens, target, strict=True):
            p = silu(linear(s, f"projectors.{k}.0", hidden))
            p = linear(s, f"projectors.{k}.4", silu(linear(s, f"projectors.{k}.2", p)))
            total = total - (unit(p) * unit(wanted)).sum(-1).mean()
    return total / (len(targets) * len(hiddens))


def interpolate(path, z, noise, t):
    if path == "linear":
        return (1 - t) * z + t * noise, noise - z
    a, b = math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
    return a * z + b * noise, (math.pi / 2) * (a * noise - b * z)


def losses(s, z, noise, t, labels, targets, *, path, heads, patch, block):
    """Return (velocity [B,C,S,S], its loss, alignment loss) of a batch, one sample at a time."""
    velocities, hiddens, squares = [], [], []
    for i in range(len(z)):
        x, wanted = interpolate(path, z[i], noise[i], t[i].item())
        v, h = velocity_and_hidden(
            s, x, t[i], int(labels[i]), heads=heads, patch=patch, block=block
        )
        velocities.append(v)
        hiddens.append(h)
        squares.append(((v - wanted) ** 2).mean())
    velocity_loss = torch.stack(squares).mean()
    return torch.stack(velocities), velocity_loss, alignment(s, hiddens, targets)
