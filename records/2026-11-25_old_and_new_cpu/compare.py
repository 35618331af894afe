"""The scripts of two folders, from the same seeds on one thread: are the logged runs the same to the last bit?

python compare.py OLD NEW. OLD has the scripts as of commit ef929c6, before recipe and machinery were parted. Keys of hyp have
other names in NEW. OLD's fashion_fast.py drew the places of a cutout of no pixels too; NEW does not, so that copies of
both with these draws taken out of OLD are compared where aug.cutout is 0.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CASES = [
    ('mnist', 'run.runs=2 run.seed=1000'),
    ('mnist', 'run.dtype=bfloat16'),
    ('mnist', 'net.crop=28 opt.epochs=0.3'),
    ('mnist', 'opt.candidates=1 opt.epochs=0.3'),
    ('mnist', 'opt.head_start=0 opt.epochs=0.3'),
    ('mnist', 'aug.shift=2 net.crop=24 opt.epochs=0.5 net.widths=(32,64,128)'),
    ('mnist', 'aug.shift=1 opt.epochs=0.1 run.dtype=bfloat16'),
    ('fashion', 'net.widths=(8,16,16) opt.epochs=0.5'),
    ('fashion', 'net.widths=(8,16,16) opt.epochs=0.5 run.dtype=bfloat16'),
    ('fashion', 'net.widths=(8,16,16) opt.epochs=0.3 aug.shift=1 aug.cutout=8'),
    ('cifar', 'net.widths=(8,16,16) opt.epochs=1.6 opt.full_epochs=1'),
    ('cifar', 'net.widths=(8,16,16) opt.epochs=1.6 opt.full_epochs=1 run.dtype=bfloat16'),
    ('cifar', 'net.widths=(8,16,16) opt.epochs=1 net.depth=3 aug.shift=4 aug.cutout=12 opt.batch_size=500'),
]
DRAWS = ('    corners = torch.randint(last + 2 - cutout, (2, n, 1), device=device)\n',
         '    corners = torch.randint(last + 2 - cutout, (2, n, 1), device=device) if cutout else place[:2, None, None]\n')


def runs_of(folder, script, arguments, is_new):
    """What the log says of the runs, without their times."""
    with tempfile.TemporaryDirectory() as beside:
        text = Path(folder, f'{script}_fast.py').read_text().replace(*DRAWS)
        Path(beside, 'script.py').write_text(text)
        words = ['run.runs=1', 'run.dtype=float32', *arguments.split(), f'run.log={beside}/log']
        if is_new:
            words = [word.replace('opt.head_start', 'opt.select_after') for word in words]
        command = [sys.executable, f'{beside}/script.py', *words]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
        lines = [json.loads(line) for line in open(f'{beside}/log')]
    return [{key: line[key] for key in ('seed', 'acc', 'acc_plain', 'loss', 'curve')} for line in lines[1:]]


for script, arguments in CASES:
    old = runs_of(sys.argv[1], script, arguments, False)
    new = runs_of(sys.argv[2], script, arguments, True)
    verdict = 'the same' if old == new else f'accuracy {old[0]["acc"]} and {new[0]["acc"]}'
    print(f'{script}_fast.py {arguments}: {verdict}', flush=True)
