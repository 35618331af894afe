"""Writes 500 training and 1,000 test images of five classes of CIFAR-10 as PNG: python make_small.py CIFAR10.pt FOLDER"""
import sys
from pathlib import Path

import torch
from PIL import Image

data = torch.load(sys.argv[1], weights_only=True)
for split, count in (('train', 100), ('test', 200)):
    for label in range(5):
        folder = Path(sys.argv[2]) / split / data['classes'][label]
        folder.mkdir(parents=True)
        chosen = (data[split]['labels'] == label).nonzero()[:count, 0]
        for number, image in enumerate(data[split]['images'][chosen]):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f'{number:03d}.png')
