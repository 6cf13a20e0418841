"""A transformer in plain numpy, float64: outputs, and the gradient of all weights by hand."""

import numpy as np

BLOCK = ("attention", "output", "mlp", "inner", "outer")


def weights_of(parameters):
    """Of a `learning.transformer.Transformer`, by name, in float64."""
    return {name: np.asarray(x, np.float64) for name, x in parameters["params"].items()}


def of_block(weights, block):
    return {name: x[block] for name, x in weights.items() if name.split("_")[0] in BLOCK}


def norm_forward(x, scale):
    rate = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * rate * scale, (x, rate, scale)


def norm_backward(tape, slope):
    """Slopes of the inputs and of the scale."""
    x, rate, scale = tape
    at_unit = slope * scale
    at_x = rate * at_unit - x * rate**3 * (at_unit * x).mean(-1, keepdims=True)
    return at_x, (slope * x * rate).reshape(-1, x.shape[-1]).sum(0)


def gelu_forward(x):
    bent = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    return 0.5 * x * (1 + bent), (x, bent)


def gelu_backward(tape, slope):
    x, bent = tape
    inner = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    return slope * (0.5 * (1 + bent) + 0.5 * x * (1 - bent**2) * inner)


def heads_of(x, heads):
    batch, places, width = x.shape
    return x.reshape(batch, places, heads, width // heads).swapaxes(1, 2)


def joined(x):
    batch, heads, places, size = x.shape
    return x.swapaxes(1, 2).reshape(batch, places, heads * size)


def flat(x):
    return x.reshape(-1, x.shape[-1])


def block_forward(weights, hidden, heads):
    normed, of_norm = norm_forward(hidden, weights["attention_scale"])
    query, key, value = (heads_of(x, heads) for x in np.split(normed @ weights["attention_kernel"], 3, axis=-1))
    places = hidden.shape[1]
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
    scores = np.where(np.tril(np.ones((places, places), bool)), scores, -np.inf)
    share = np.exp(scores - scores.max(-1, keepdims=True))
    share = share / share.sum(-1, keepdims=True)
    mixed = joined(share @ value)
    between = hidden + mixed @ weights["output_kernel"]
    inputs, of_mlp = norm_forward(between, weights["mlp_scale"])
    inner, of_gelu = gelu_forward(inputs @ weights["inner_kernel"] + weights["inner_bias"])
    after = between + inner @ weights["outer_kernel"] + weights["outer_bias"]
    return after, (of_norm, normed, query, key, value, share, mixed, of_mlp, inputs, of_gelu, inner, heads)


def block_backward(weights, tape, slope):
    """Slopes of the weights, by name, and of what came in."""
    of_norm, normed, query, key, value, share, mixed, of_mlp, inputs, of_gelu, inner, heads = tape
    found = {"outer_kernel": flat(inner).T @ flat(slope), "outer_bias": flat(slope).sum(0)}
    at_inner = gelu_backward(of_gelu, slope @ weights["outer_kernel"].T)
    found |= {"inner_kernel": flat(inputs).T @ flat(at_inner), "inner_bias": flat(at_inner).sum(0)}
    at_between, found["mlp_scale"] = norm_backward(of_mlp, at_inner @ weights["inner_kernel"].T)
    at_between = at_between + slope
    found["output_kernel"] = flat(mixed).T @ flat(at_between)
    at_mixed = heads_of(at_between @ weights["output_kernel"].T, heads)
    at_share = at_mixed @ value.swapaxes(-1, -2)
    at_scores = share * (at_share - (at_share * share).sum(-1, keepdims=True)) / np.sqrt(query.shape[-1])
    parts = at_scores @ key, at_scores.swapaxes(-1, -2) @ query, share.swapaxes(-1, -2) @ at_mixed
    at_projected = np.concatenate([joined(x) for x in parts], axis=-1)
    found["attention_kernel"] = flat(normed).T @ flat(at_projected)
    at_hidden, found["attention_scale"] = norm_backward(of_norm, at_projected @ weights["attention_kernel"].T)
    return found, at_hidden + at_between


def forward(weights, tokens, heads):
    """Outputs `[batch, n, outputs]` behind tokens `[batch, n]`, and what `backward` needs."""
    hidden, tapes = weights["token_kernel"][tokens] + weights["place_kernel"][: tokens.shape[1]], []
    for block in range(len(weights["inner_bias"])):
        hidden, tape = block_forward(of_block(weights, block), hidden, heads)
        tapes.append(tape)
    normed, of_norm = norm_forward(hidden, weights["head_scale"])
    return normed @ weights["head_kernel"], (tokens, tapes, normed, of_norm)


def backward(weights, tape, slope):
    """The gradient of all weights, by name, for slopes at the outputs."""
    tokens, tapes, normed, of_norm = tape
    found = {"head_kernel": flat(normed).T @ flat(slope)}
    at_hidden, found["head_scale"] = norm_backward(of_norm, slope @ weights["head_kernel"].T)
    blocks = []
    for block in reversed(range(len(tapes))):
        of_this, at_hidden = block_backward(of_block(weights, block), tapes[block], at_hidden)
        blocks.insert(0, of_this)
    found |= {name: np.stack([one[name] for one in blocks]) for name in blocks[0]}
    found["token_kernel"] = np.zeros_like(weights["token_kernel"])
    np.add.at(found["token_kernel"], tokens, at_hidden)
    found["place_kernel"] = np.zeros_like(weights["place_kernel"])
    found["place_kernel"][: tokens.shape[1]] = at_hidden.sum(0)
    return found
