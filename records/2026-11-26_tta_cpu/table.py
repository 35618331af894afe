"""The accuracies of sets of views, from files of views.py: python table.py FILE [FILE ...]"""
import statistics
import sys

import torch

runs = [torch.load(path) for path in sys.argv[1:]]
PLUS = (-1, 0), (0, -1), (0, 1), (1, 0)
DIAGONAL = (-1, -1), (-1, 1), (1, -1), (1, 1)

def weights(centre, plus, diagonal):
    return {(0, 0): centre, **dict.fromkeys(PLUS, plus), **dict.fromkeys(DIAGONAL, diagonal)}

SETS = {
    'the image': weights(1, 0, 0),
    'two diagonal moves': {(0, 0): 1, (-1, -1): 1, (1, 1): 1},
    'two diagonal moves, image twice': {(0, 0): 2, (-1, -1): 1, (1, 1): 1},
    'plus': weights(1, 1, 0),
    'plus, image twice': weights(2, 1, 0),
    'plus, image four times': weights(4, 1, 0),
    'up and down': {(0, 0): 1, (-1, 0): 1, (1, 0): 1},
    'left and right': {(0, 0): 1, (0, -1): 1, (0, 1): 1},
    'four diagonal moves': weights(1, 0, 1),
    'four diagonal moves, image twice': weights(2, 0, 1),
    'all nine': weights(1, 1, 1),
    'all nine, weights 4, 2, 1': weights(4, 2, 1),
}

def accuracy(run, key, chosen, share):
    probabilities = run['reflected'][0, 0, 0].softmax(1)
    first, second = probabilities.topk(2).values.T
    uncertain = (second - first).topk(round(share * len(probabilities))).indices
    seen = sum(weight * run[key][(*move, flip)].softmax(1) for move, weight in chosen.items() for flip in (0, 1))
    probabilities[uncertain] = seen[uncertain]
    return (probabilities.argmax(1) == run['labels']).float().mean().item()

print('accuracy of the runs, plain:', *(f'{run["result"][0]:.4f}, {run["result"][1]:.4f};' for run in runs))
print('each set with its mirror images; mean of the runs in %; share of images 0.15, 0.25, 1')
for key in ('reflected', 'rolled'):
    if key in runs[0]:
        for name, chosen in SETS.items():
            cells = [statistics.mean(accuracy(run, key, chosen, share) for run in runs) for share in (0.15, 0.25, 1)]
            print(f'{key:10}{name:34}', *(f'{100 * cell:.2f}' for cell in cells))
