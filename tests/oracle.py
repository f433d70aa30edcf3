"""The papers' formulas again, dense and in numpy float64. Shares no code with variants/.

Shapes: W (o, i), B (o, k), A (k, i), g and m (o,), x (n, i), dy (n, o). `keep` (n, i) is 0 or 1.
Gradients are of L with dL/dy = dy, by way of G = dL/dW' (o, i).
"""

import numpy as np


def lora_scale(alpha, rank, scaling="lora"):
    """alpha / r (arXiv:2106.09685, section 4.1) or alpha / sqrt(r) (arXiv:2312.03732)."""
    return alpha / {"lora": rank, "rslora": np.sqrt(rank)}[scaling]


def lora_weight(W, B, A, s, B0=None, A0=None):
    """W + s B A, less s B0 A0 where the start is subtracted."""
    return W + s * (B @ A) - (0 if B0 is None else s * (B0 @ A0))


def dora_weight(W, B, A, s, m):
    """diag(m / ||V'||) V' with V' = W + s B A, a norm for each output (arXiv:2402.09353, eq. 5)."""
    V = W + s * (B @ A)
    return m[:, None] * V / np.linalg.norm(V, axis=1, keepdims=True)


def dora_gradients(x, dy, W, B, A, s, m, detach_norm):
    """dL/d(x, B, A, m). Detached, the norm is a constant (section 4.3)."""
    V = W + s * (B @ A)
    C = np.linalg.norm(V, axis=1, keepdims=True)
    G = dy.T @ x
    along = np.sum(G * V, axis=1, keepdims=True)  # <dL/dW', V'>
    dV = (m[:, None] / C) * (G if detach_norm else G - V * along / C**2)
    return {
        "x": dy @ dora_weight(W, B, A, s, m),
        "B": s * dV @ A.T,
        "A": s * B.T @ dV,
        "m": (along / C)[:, 0],
    }


def dora_magnitude_dropout(x, W, bias, B, A, s, m, keep, p):
    """y = x W^T + (g - 1) x~ W^T + g s x~ A^T B^T + bias, the authors' code."""
    g = m / np.linalg.norm(W + s * (B @ A), axis=1)
    dropped = x * keep / (1 - p)
    return x @ W.T + (g - 1) * (dropped @ W.T) + g * s * (dropped @ A.T @ B.T) + bias


def gained_low_rank_linear(x, W, bias, B, A, s, g, keep=None, p=0.0):
    """y = g (x W^T + s x~ A^T B^T) + bias."""
    dropped = x if keep is None else x * keep / (1 - p)
    return g * (x @ W.T + s * (dropped @ (B @ A).T)) + bias


def gained_low_rank_linear_gradients(x, dy, W, B, A, s, g, keep=None, p=0.0):
    """dL/d(x, bias, B, A, g) of `gained_low_rank_linear`."""
    mask = 1.0 if keep is None else keep / (1 - p)
    dz = g * dy
    D = dz.T @ (x * mask)  # dL/d(s B A)
    z = x @ W.T + s * ((x * mask) @ (B @ A).T)
    return {
        "x": dz @ W + s * (dz @ B @ A) * mask,
        "bias": dy.sum(0),
        "B": s * D @ A.T,
        "A": s * B.T @ D,
        "g": (dy * z).sum(0),
    }


def central_differences(f, array, h=1e-6):
    """df/d(array) of a scalar f by central differences; `array` is written and restored."""
    gradient = np.empty_like(array)
    for index in np.ndindex(array.shape):
        value = array[index]
        array[index] = value + h
        above = f()
        array[index] = value - h
        gradient[index] = (above - f()) / (2 * h)
        array[index] = value
    return gradient
