"""The scripts of two folders, from the same seeds on one thread: are the logged runs the same to the last bit?
python compare.py OLD NEW"""
import json, os, subprocess, sys, tempfile

CASES = [('mnist', 'run.runs=2 run.seed=1000'), ('mnist', 'run.dtype=bfloat16'),
         ('mnist', 'net.crop=28 opt.epochs=0.3'),
         ('mnist', 'aug.shift=2 net.crop=24 opt.epochs=0.5 net.widths=(32,64,128)'),
         ('fashion', 'net.widths=(8,16,16) opt.epochs=0.5'),
         ('fashion', 'net.widths=(8,16,16) opt.epochs=0.5 run.dtype=bfloat16'),
         ('fashion', 'net.widths=(8,16,16) opt.epochs=0.3 aug.shift=1 aug.cutout=8'),
         ('cifar', 'net.widths=(8,16,16) opt.epochs=1.6 opt.full_epochs=1'),
         ('cifar', 'net.widths=(8,16,16) opt.epochs=1.6 opt.full_epochs=1 run.dtype=bfloat16')]
for name, arguments in CASES:
    found = []
    for folder in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as beside:
            words = 'run.runs=1', *arguments.split(), f'run.log={beside}/log'
            command = [sys.executable, f'{folder}/{name}_fast.py', *words]
            subprocess.run(command, check=True, capture_output=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
            lines = [json.loads(line) for line in open(f'{beside}/log')]
        found.append([{key: line[key] for key in ('seed', 'acc', 'acc_plain', 'loss', 'curve')} for line in lines[1:]])
    print(f'{name}_fast.py {arguments}:', 'the same' if found[0] == found[1] else
          f'accuracy {found[0][0]["acc"]} and {found[1][0]["acc"]}', flush=True)
