"""Accuracy against compute on CIFAR-10: python draw.py, beside the logs and compute.csv -> compute.png."""
import csv
import json
import statistics

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

OURS, THEIRS = '#D55E00', '#0072B2'  # told apart by the colour-blind too (Okabe and Ito, 2008)
PUBLISHED = {'airbench94_muon': (0.29, 94.01, (-12, -14)), 'airbench94': (0.36, 94.01, (8, -4)),
             'airbench95': (1.4, 95.01, (7, -12)), 'airbench96_faster': (3.1, 96.00, (8, -15)),
             'airbench96': (7.5, 96.05, (-25, 8)), 'ResNet-18': (32.3, 96.0, (-30, 8))}  # PFLOP, %, place of the name

figure, axes = plt.subplots(figsize=(7, 3.6))
points = []
for row in csv.DictReader(open('compute.csv')):
    accs = []
    for path in row['logs'].split():
        lines = [json.loads(line) for line in open(path)]
        accs += [100 * line['acc'] for line in lines if 'acc' in line]
    points.append((float(row['pflop']), statistics.mean(accs), len(accs), row['label']))
axes.plot([point[0] for point in points], [point[1] for point in points], 'o-', color=OURS,
          label='cifar_fast.py, measured')
for pflop, acc, n, label in points:
    left = pflop > 0.15  # these names stand on the other side, to make room for theirs
    axes.annotate(f'{label}: {acc:.2f} % (n = {n})', (pflop, acc), xytext=(-6, 7) if left else (8, -4),
                  textcoords='offset points', fontsize=8, ha='right' if left else 'left')

axes.plot([place[0] for place in PUBLISHED.values()], [place[1] for place in PUBLISHED.values()], 's', color=THEIRS,
          fillstyle='none', label='as published by their authors')
for name, (pflop, acc, offset) in PUBLISHED.items():
    axes.annotate(name, (pflop, acc), xytext=offset, textcoords='offset points', fontsize=8)

axes.set_xscale('log')
axes.set_xlim(0.016, 60)
axes.set_ylim(top=96.7)
axes.set_xticks([0.1, 1, 10], ['0.1', '1', '10'])
axes.set_xlabel('compute of a run, PFLOP (training and test)')
axes.set_ylabel('CIFAR-10 test accuracy, %')
axes.grid(alpha=0.3, which='both')
axes.legend(loc='lower right', frameon=False)
figure.tight_layout()
figure.savefig('compute.png', dpi=130)
