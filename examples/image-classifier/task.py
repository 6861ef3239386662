"""Handwritten digits: the model, the data of a node, training. It knows nothing of Flower."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn


def make_model() -> nn.Module:
    """Return a small convolutional network with batch normalisation."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def load_data(partition_id: int | None = None, num_partitions: int = 1):
    """Return images (N, 1, 8, 8) and labels (N,): a node's share, or the test set for None."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    test, train = order[:360], order[360:]
    chosen = test if partition_id is None else train[partition_id::num_partitions]
    images = torch.tensor(digits.images[chosen] / 16, dtype=torch.float32)[:, None]
    return images, torch.tensor(digits.target[chosen])


def train(model: nn.Module, images, labels, epochs: int, rate: float, seed: int) -> float:
    """Train in place by SGD; return the mean loss of the last epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.0)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        losses = []
        for batch in torch.randperm(len(labels), generator=generator).split(32):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return float(np.mean(losses))


@torch.no_grad()
def test(model: nn.Module, images, labels) -> tuple[float, float]:
    """Return loss and accuracy."""
    model.eval()
    logits = model(images)
    accuracy = (logits.argmax(1) == labels).float().mean()
    return F.cross_entropy(logits, labels).item(), accuracy.item()


def get_weights(model: nn.Module) -> list[np.ndarray]:
    """Return parameters, running statistics and counters."""
    return [tensor.cpu().numpy() for tensor in model.state_dict().values()]


def set_weights(model: nn.Module, arrays: list[np.ndarray]) -> None:
    """Set them."""
    state = zip(model.state_dict(), arrays, strict=True)
    model.load_state_dict({name: torch.tensor(array) for name, array in state})
