"""Trains a sparse autoencoder on one layer of a dump.

dump-activations --demo --n-samples 14138 --outputs layer_outputs --dtype fp16 -o acts.safetensors
python sae.py acts.safetensors 2
"""

import sys

import torch
from torch import nn

from dump_activations import ActivationsFile

FEATURES, ACTIVE, EPOCHS = 256, 16, 3

acts, layer = ActivationsFile(sys.argv[1]), int(sys.argv[2])
some = acts.read("layer_outputs", slice(1000), layer=layer).float().flatten(0, 1)
mean, scale = some.mean(0), some.std()

encoder, decoder = nn.Linear(some.shape[1], FEATURES), nn.Linear(FEATURES, some.shape[1])
encoder.weight.data = decoder.weight.data.T.clone()
optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)

cells = acts.cells("layer_outputs", layer, batch_size=512)
for epoch in range(EPOCHS):
    unexplained = 0.0
    for batch in cells:  # each epoch in another order
        x = (batch.values.float() - mean) / scale
        top = encoder(x).topk(ACTIVE)
        features = torch.zeros(len(x), FEATURES).scatter(1, top.indices, top.values.relu())
        loss = (decoder(features) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        unexplained += loss.item() / len(cells)
    print(f"epoch {epoch}: {unexplained:.3f} of the variance is unexplained")
