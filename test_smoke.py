"""Tests of the scripts as a user meets them: python -m pytest. No network; real data is used where DATA_DIR has it."""
import ast
import contextlib
import ctypes
import difflib
import functools
import gc
import gzip
import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tarfile
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
REAL_DATA = Path(os.environ.get('DATA_DIR', 'data')).resolve()
SCRIPTS = 'mnist_fast', 'fashion_fast', 'cifar_fast'
LINE = '# Nothing below depends on the data set'
RECIPE_LIMITS = {'mnist': 360, 'fashion': 372, 'cifar': 427}  # lines above the line
MACHINERY_LIMIT = 704  # lines below it
SYNTHETIC = 'data.name=Synthetic', 'run.device=cpu', 'run.log=log.jsonl'
SMALL = *SYNTHETIC, 'net.widths=(8,16,16)', 'opt.epochs=2', 'opt.batch_size=250'  # a core trains this in seconds
TINY = {'mnist_fast': ('opt.epochs=0.1',),  # a few steps of each script
        'fashion_fast': ('net.widths=(4,4,4)', 'opt.epochs=0.5', 'opt.batch_size=250'),
        'cifar_fast': ('net.widths=(4,4,4)', 'opt.epochs=0.5', 'opt.batch_size=250')}
needs_torchvision = pytest.mark.skipif(not importlib.util.find_spec('torchvision'), reason='torchvision is missing')

# What each subprocess loads first. It lets nobody look up another address than this machine's, sets attributes of
# torchvision's classes as TORCHVISION says, ends a process that imports torchvision without that variable, and runs the
# code in FIRST.
SITECUSTOMIZE = '''
import importlib.machinery
import json
import os
import resource
import sys

def guard(event, arguments):
    if event == 'socket.getaddrinfo' and arguments[0] not in ('127.0.0.1', 'localhost'):
        raise OSError(f'no test goes to {arguments[0]}')

class Finder:
    def find_spec(name, path=None, target=None):
        if name == 'torchvision' and 'TORCHVISION' not in os.environ:
            print('torchvision was imported', file=sys.stderr, flush=True)
            os._exit(9)
        if name in ('torchvision.datasets.mnist', 'torchvision.datasets.cifar'):
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                classes = json.loads(os.environ['TORCHVISION'])
                for kind in set(classes) & set(dir(module)):
                    for key, value in classes[kind].items():
                        setattr(getattr(module, kind), key, value)
            spec.loader.exec_module = exec_module
            return spec

sys.addaudithook(guard)
sys.meta_path.insert(0, Finder)
if 'LARGEST_FILE' in os.environ:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ['LARGEST_FILE']),) * 2)
exec(os.environ.pop('FIRST', ''))
'''

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A test's working folder, with its data in sets."""
    (tmp_path / 'sets').mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('DATA_DIR', 'sets')
    return tmp_path

def prepare():
    """A shell's background job is born deaf to SIGINT, and so would be its children. Two processes share two cores."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])

def start(folder, *arguments, script='mnist_fast.py', launcher=(), prepare=prepare, stdin=None,
          stdout=subprocess.PIPE, **variables):
    """A process of a script, or of other Python source, that works in folder and has its data in folder/sets."""
    (folder / 'site').mkdir(exist_ok=True)
    (folder / 'site/sitecustomize.py').write_text(SITECUSTOMIZE)
    env = os.environ | {'PYTHONPATH': str(folder / 'site'), 'DATA_DIR': str(folder / 'sets'), 'no_proxy': '*'}
    env = {'OMP_NUM_THREADS': '1'} | env  # with more, small networks crawl where another program has a core
    script = [HERE / script] if script else []
    return subprocess.Popen([sys.executable, *launcher, *script, *arguments], cwd=folder, env=env | variables,
                            stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, preexec_fn=prepare,
                            encoding='utf-8', errors='replace')

def finish(process, status=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == status and 'Traceback' not in (out or '') + err, (out or '') + err
    return out, err

def run(folder, *arguments, **variables):
    """A run that ends well -> its stdout."""
    return finish(start(folder, *arguments, **variables))[0]

def fail(folder, *arguments, status=1, **variables):
    """A run that ends before training -> its one line on stderr."""
    out, err = finish(start(folder, *arguments, **variables), status)
    assert err.count('\n') == 1 and err.endswith('\n'), err
    assert 'summary' not in out and not re.search(r'^ +0 +\d', out, re.M), out
    return err

def summary(text):
    """The summary, which is the last line -> a dict."""
    keys, number = ('acc', 'std', 'ci99', 'time_s', 'target'), r'(\d+\.\d+|nan)'
    form = r'summary  script=(\w+)  runs=(\d+)  ' + '  '.join(f'{key}={number}' for key in keys) + '  met=(yes|no|open)'
    script, runs, *numbers, met = re.fullmatch(form, text.splitlines()[-1]).groups()
    return {'script': script, 'runs': int(runs), **dict(zip(keys, map(float, numbers))), 'met': met}

def read_log(path):
    """-> headers, run lines"""
    text = path.read_text(encoding='utf-8')
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]  # NaN is not JSON
    return [line for line in lines if 'hyp' in line], [line for line in lines if 'acc' in line]

def read_whole(path):
    """The lines of a log that may be growing."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith('\n')]

def make_set(labels, test_labels, script='mnist_fast'):
    """A data file's content: three classes, each a pattern of 7 x 7 fields that a network soon tells from the rest."""
    random = torch.Generator().manual_seed(1)
    patterns = F.interpolate(torch.rand(3, 1, 7, 7, generator=random), scale_factor=4)

    def images(labels):
        grey = (40 + 160 * patterns[labels] + 50 * torch.rand(len(labels), 1, 28, 28, generator=random)).byte()
        return F.pad(grey.expand(-1, 3, -1, -1), (2, 2, 2, 2)) if script == 'cifar_fast' else grey

    return {'train': {'images': images(labels), 'labels': labels}, 'classes': ['ant', 'bee', 'cat'],
            'test': {'images': images(test_labels), 'labels': test_labels}}

def save_npz(path, data):
    """A set as an .npz file, with the names that MedMNIST uses."""
    arrays = {}
    for split in ('train', 'test'):
        arrays[f'{split}_images'] = data[split]['images'][:, 0].numpy()
        arrays[f'{split}_labels'] = data[split]['labels'].numpy()
    numpy.savez(path, **arrays)

def torchvision_with(**classes):
    """A variable that lets a process import torchvision, whose classes get these attributes."""
    return {'TORCHVISION': json.dumps(classes)}

@functools.cache
def compiled(script, part):
    text = (HERE / f'{script}.py').read_text(encoding='utf-8')
    if part == 'recipe':
        text = text.partition(LINE)[0]
    return compile(text, str(HERE / f'{script}.py'), 'exec')

def fresh(script='mnist_fast', part='whole'):
    """A script's names in a dict, of the whole or of the recipe alone, with a hyp of their own; nothing has run."""
    names = {'__name__': script, '__file__': str(HERE / f'{script}.py')}
    exec(compiled(script, part), names)
    return names

internals = functools.cache(fresh)

def refusal(names, function, *arguments):
    """The line and the status with which a function of a script ends the program."""
    with pytest.raises(names['Stop']) as caught:
        names[function](*arguments)
    line, status = caught.value.args
    assert '\n' not in line
    return line, status

def say(*arguments, script='mnist_fast'):
    """What a script prints that runs in this process, which is faster than one of its own."""
    names = fresh(script)
    with mock.patch.object(sys, 'argv', [f'{script}.py', *arguments]):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            names['main']()
    return out.getvalue()

def refuse(status, *arguments, script='mnist_fast'):
    """The line with which a script that runs in this process ends before training, with that status."""
    names = fresh(script)
    with mock.patch.object(sys, 'argv', [f'{script}.py', *arguments]):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            line, found = refusal(names, 'main')
    assert found == status, line
    assert 'summary' not in out.getvalue() and not re.search(r'^ +0 +\d', out.getvalue(), re.M)
    return line

# A run

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """Two runs on generated images -> their stdout, their log's text, its header, its run lines."""
    folder = tmp_path_factory.mktemp('finished')
    out = run(folder, *SYNTHETIC, 'run.runs=2', 'run.seed=7')
    (header,), lines = read_log(folder / 'log.jsonl')
    return out, (folder / 'log.jsonl').read_text(), header, lines

def test_a_run_learns_and_says_so(finished):
    out, _, header, lines = finished
    result = summary(out)
    assert (result['script'], result['runs'], result['target']) == ('mnist_fast', 2, header['hyp']['run']['target'])
    assert result['acc'] > 0.5  # chance is 0.1
    assert abs(result['acc'] - (lines[0]['acc'] + lines[1]['acc']) / 2) < 2e-5
    assert abs(result['time_s'] - (lines[0]['time_s'] + lines[1]['time_s']) / 2) < 2e-3
    assert len(re.findall(r'^ +[01] +[78] ', out, re.M)) == 2  # the table

def test_the_log(finished):
    _, text, header, lines = finished
    assert [json.loads(line) for line in text.splitlines()] == [header, *lines]
    assert set(header) == {'session', 'script', 'code', 'hyp', 'device', 'torch', 'threads', 'command'}
    assert header['script'] == 'mnist_fast' and header['code'] == (HERE / 'mnist_fast.py').read_text()
    assert (header['device'], header['torch']) == ('cpu', torch.__version__)
    assert type(header['threads']) is int and all(argument in header['command'] for argument in SYNTHETIC)
    assert header['hyp']['data']['name'] == 'Synthetic' and [line['seed'] for line in lines] == [7, 8]
    assert header['hyp']['run']['dtype'] in ('bfloat16', 'float32')  # what 'auto' became
    for line in lines:
        assert set(line) == {'session', 'seed', 'acc', 'acc_plain', 'loss', 'time_s', 'total_s', 'steps', 'curve'}
        assert line['session'] == header['session']
        assert 0.5 < line['acc'] <= 1 and 0.5 < line['acc_plain'] <= 1 and 0 < line['loss'] < 2.3
        assert 0 < line['time_s'] < line['total_s'] < 300
        steps, losses = zip(*line['curve'])
        assert {type(step) for step in (*steps, line['steps'])} == {int} and {type(loss) for loss in losses} == {float}
        assert 1 <= steps[0] and steps[-1] <= line['steps'] and list(steps) == sorted(set(steps)) and len(steps) > 2
        assert losses[0] > losses[-1]

def test_a_seed_gives_a_result_to_the_last_bit(finished, folder):
    seed7, seed8 = finished[-1]
    run(folder, *SYNTHETIC, 'run.runs=1', 'run.seed=8')
    _, (again,) = read_log(folder / 'log.jsonl')
    for key in ('loss', 'acc', 'acc_plain', 'curve', 'steps'):
        assert again[key] == seed8[key], key
    assert again['loss'] != seed7['loss'] and again['curve'] != seed7['curve']

@pytest.mark.parametrize('script', ['fashion_fast.py', 'cifar_fast.py'])
def test_learns(folder, script):
    """In under a minute on two cores, and one seed gives one result to the last bit."""
    result = summary(run(folder, *SMALL, 'run.runs=2', script=script))
    assert (result['script'], result['runs']) == (script[:-3], 2) and result['acc'] > 0.5  # chance is 0.1
    run(folder, *SMALL, 'run.runs=1', 'run.seed=1', script=script)
    _, (seed0, seed1, again) = read_log(folder / 'log.jsonl')
    assert again | {key: seed1[key] for key in ('session', 'time_s', 'total_s')} == seed1 != seed0
    assert seed0['total_s'] < 60

def test_a_diverging_run_says_where(folder):
    """And leaves neither a network nor a picture."""
    high = 'opt.lr=1e9', 'opt.head_lr=1e9', 'opt.bias_lr=1e9'
    made = 'run.save=a.pt2', 'run.picture=b.png'
    out, err = finish(start(folder, *SYNTHETIC, *high, *made, 'run.seed=7', 'run.runs=3'), status=1)
    assert err.count('\n') == 1 and re.search(r'\b7\b.*\bstep \d+\b', err) and 'learning rates' in err, err
    (header,), lines = read_log(folder / 'log.jsonl')
    assert not lines and 'summary' not in out
    assert not (folder / 'a.pt2').exists() and not (folder / 'b.png').exists()

# Spoils the losses of the run with seed 8.
NAN = '''
import torch
import torch.nn.functional as F
def cross_entropy(*arguments, whole=F.cross_entropy, **options):
    return whole(*arguments, **options) * (float('nan') if torch.initial_seed() == 8 else 1)
F.cross_entropy = cross_entropy
'''

def test_a_diverging_run_comes_after_the_summary_of_the_others(folder):
    out, err = finish(start(folder, *SYNTHETIC, 'run.seed=7', 'run.runs=3', FIRST=NAN), status=1)
    assert err.count('\n') == 1 and re.search(r'\b8\b.*\bstep 1\b', err), err
    _, (line,) = read_log(folder / 'log.jsonl')
    assert line['seed'] == 7 and summary(out)['runs'] == 1

@pytest.mark.parametrize('dtype, advice', [('float16', 'run.dtype=float32'), ('bfloat16', 'learning rates'),
                                           ('float32', 'learning rates')])
def test_advice_where_a_loss_is_not_finite(dtype, advice):
    names = fresh()
    names['hyp']['run']['dtype'] = dtype
    for losses in ([2.3, math.nan, math.nan], [2.3, math.inf, 1.0]):
        line, status = refusal(names, 'timed_run', lambda seed, losses=losses: (torch.ones(3), torch.tensor(losses)), 5)
        assert status == 1 and advice in line and re.search(r'\b5\b.*\bstep 2\b', line), line

def test_a_test_loss_that_is_not_finite_ends_the_program():
    """The last step's update is seen by no training loss."""
    result = torch.tensor([0.1, 0.1, math.nan])
    line, status = refusal(fresh(), 'timed_run', lambda seed: (result, torch.tensor([2.3, 2.2])), 5)
    assert status == 1 and re.search(r'\b5\b', line), line

def test_ctrl_c_ends_with_the_summary(folder):
    process = start(folder, *SYNTHETIC, 'run.runs=1000')
    log = folder / 'log.jsonl'
    while not log.exists() or log.read_text().count('\n') < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = finish(process, status=130)
    (header,), lines = read_log(log)
    assert err == '' and summary(out)['runs'] == len(lines) < 1000
    assert [line['seed'] for line in lines] == list(range(len(lines)))

def test_cifar_recipes_run(folder):
    """With what the long recipes add: three convolutions in a group and a shortcut, cutout, larger shifts."""
    long = 'net.depth=3', 'aug.cutout=12', 'aug.shift=4', 'opt.batch_size=100'
    assert summary(say(*SMALL, *long, 'run.runs=1', script='cifar_fast'))['acc'] > 0.3

def test_a_hundred_classes(folder):
    labels = torch.arange(2000) % 100
    images = (labels[:, None, None, None] * 2 + torch.randint(20, (2000, 3, 32, 32))).byte()
    torch.save({'train': {'images': images, 'labels': labels}, 'test': {'images': images, 'labels': labels},
                'classes': [str(number) for number in range(100)]}, folder / 'sets/Hundred.pt')
    small = 'net.widths=(8,16,32)', 'opt.batch_size=100', 'opt.epochs=10', 'run.runs=1'
    assert summary(say('data.name=Hundred', *small, script='cifar_fast'))['acc'] > 0.1  # chance is 0.01

@pytest.mark.skipif(not (REAL_DATA / 'MNIST.pt').exists(), reason='DATA_DIR has no MNIST.pt')
def test_real_mnist(folder):
    assert summary(run(folder, 'run.runs=1', DATA_DIR=str(REAL_DATA)))['acc'] > 0.987

@pytest.mark.skipif(not (REAL_DATA / 'FashionMNIST.pt').exists(), reason='DATA_DIR has no FashionMNIST.pt')
def test_real_fashion():
    short = 'net.widths=(8,16,32)', 'opt.epochs=1', 'opt.batch_size=250', 'run.runs=1'
    assert summary(say(*short, f'data.dir={REAL_DATA}', script='fashion_fast'))['acc'] > 0.87

@pytest.mark.skipif(not (REAL_DATA / 'CIFAR10.pt').exists(), reason='DATA_DIR has no CIFAR10.pt')
def test_real_cifar():
    short = 'net.widths=(16,32,64)', 'opt.epochs=2', 'opt.batch_size=250', 'run.runs=1'
    assert summary(say(*short, f'data.dir={REAL_DATA}', script='cifar_fast'))['acc'] > 0.68

# Values

def test_overrides_take_effect(finished, folder):
    """On a user's own set, with three classes."""
    labels = torch.arange(1000) % 3
    torch.save(make_set(labels, labels[:300]), folder / 'sets/Mine.pt')
    mine = 'data.name=Mine', 'run.log=log.jsonl', 'run.runs=1', 'run.target=0'
    result = summary(run(folder, *mine, 'opt.epochs=20'))
    say(*mine, 'opt.epochs=1e-5', "run.device='cpu'", f'data.dir={folder}/sets')
    (long, least), lines = read_log(folder / 'log.jsonl')
    assert result['acc'] > 0.9 and result['target'] == 0
    assert [line['session'] for line in lines] == [long['session'], least['session']]
    assert lines[0]['steps'] > 5 and lines[1]['steps'] == 1  # however short, a run takes a step
    expected = finished[2]['hyp']
    for group, values in {'opt': {'epochs': 20.0}, 'data': {'name': 'Mine', 'dir': str(folder / 'sets')},
                          'run': {'device': 'auto', 'runs': 1, 'seed': 0, 'target': 0.0}}.items():
        expected = expected | {group: expected[group] | values}
    assert long['hyp'] == expected
    assert (least['hyp']['opt']['epochs'], least['hyp']['run']['device']) == (1e-5, 'cpu')

def test_wrong_overrides():
    cases = {'opt.epoch=2': 'opt.epochs', 'batch_size=64': 'opt.batch_size', 'opt.epochs=fast': 'float',
             'run.runs=2.5': 'int', 'opt.lr={[]}': 'float', 'run.compile=1': 'run.', 'opt.head_start=0.5': 'opt.',
             '--epochs=3': 'opt.epochs'}
    for argument, named in cases.items():
        line, status = refusal(fresh(), 'override', [argument])
        assert status == 2 and argument in line and named in line, line
    for argument, kind in {'aug.flip=1': 'bool', 'aug.flip=yes': 'bool'}.items():
        line, status = refusal(fresh('cifar_fast'), 'override', [argument])
        assert status == 2 and 'aug.flip' in line and kind in line, line

def ranges(script):
    """The ranges in a script's hyp: {dotted name: (value, lowest, highest)}, or None in a range's place."""
    found = {}
    for group, values in fresh(script, 'recipe')['hyp'].items():
        for name, value in values.items():
            if isinstance(value, types.SimpleNamespace):
                found[f'{group}.{name}'] = value.value, value.lowest, value.highest
            elif type(value) in (int, float, tuple):
                found[f'{group}.{name}'] = None
    return found

@pytest.mark.parametrize('script', SCRIPTS)
def test_every_number_has_a_range(script):
    found = ranges(script)
    assert len(found) > 15 and [name for name in found if found[name] is None] == []
    side = min(found['data.shape'][0][1:])
    for name, (value, lowest, highest) in found.items():
        highest = side if highest == 'side' else highest
        if type(value) is tuple:
            assert len(lowest) == len(value), name
            assert all(low <= number <= highest for low, number in zip(lowest, value)), name
        else:
            assert lowest <= value <= highest, name
    defaults = fresh(script)
    defaults['override']([])  # they are accepted
    for name, (value, _, _) in found.items():
        group, key = name.split('.')
        assert defaults['hyp'][group][key] == value and type(defaults['hyp'][group][key]) is type(value), name

OUT_OF_RANGE = {
    'mnist_fast': ['opt.batch_size=0', 'opt.batch_size=-5', 'run.runs=-1', 'net.widths=(0,0,0)', 'tta.share=2',
                   'opt.select_after=2', 'opt.label_smoothing=2', 'net.crop=29', 'ema.decay=1.5', 'opt.epochs=-1',
                   'run.target=99', f'run.seed={2**64}', 'run.seed=-1', 'opt.lr=-0.1', 'opt.lr=1e999', 'opt.warmup=1',
                   'opt.momentum=1.01', 'aug.shift=-1', 'opt.candidates=0', 'data.shape=(0,28,28)',
                   'data.shape=(1,28,4)', 'net.crop=7', 'run.holdout=-1', 'opt.epochs=1000000',
                   'net.widths=(16,32,-64)'],
    'fashion_fast': ['opt.candidates=0.5', 'aug.cutout=29', 'data.shape=(1,8,28)', 'aug.shift=-1', 'tta.share=-0.1',
                     'ema.decay=1', 'net.scale=0.9'],
    'cifar_fast': ['opt.small_size=8', 'aug.cutout=33', 'net.depth=1', 'ema.decay=-0.1', 'opt.hard_share=-0.5',
                   'opt.sgd_momentum=2', 'opt.weight_decay=-1e-9', 'opt.full_passes=0', 'data.shape=(3,32,1)']}
OF_ANOTHER_TYPE = ['net.widths=(16,32)', 'net.widths=(16,32,64,128)', 'net.widths=(16,32,6.5)', 'net.widths=16',
                   'net.widths=[16,32,64]', 'data.shape=(28,28)', 'data.shape=28', 'run.runs=True', 'run.runs=1e3',
                   'opt.batch_size=1e2', 'opt.epochs=nan', 'opt.epochs=None', 'opt.epochs=', 'opt.lr', 'run.seed=2**64']

@pytest.mark.parametrize('script, argument', [(script, argument) for script in SCRIPTS
                                              for argument in OUT_OF_RANGE[script]])
def test_a_value_out_of_its_range(script, argument):
    """Its line has the key and the range."""
    line, status = refusal(fresh(script), 'override', [argument])
    key = argument.split('=')[0]
    _, lowest, highest = ranges(script)[key]
    highest = min(fresh(script, 'recipe')['hyp']['data']['shape'].value[1:]) if highest == 'side' else highest
    assert status == 2 and line.startswith(f'{key}=') and f'{lowest} to {highest}' in line, line

@pytest.mark.parametrize('argument', OF_ANOTHER_TYPE)
def test_a_value_of_another_type(argument):
    """Its line has the key, the type and the default."""
    names = fresh()
    group, key = argument.split('=')[0].split('.')
    default = names['hyp'][group][key]
    line, status = refusal(names, 'override', [argument])
    assert status == 2 and line.startswith(f'{group}.{key}') and repr(default) in line, line
    assert type(default).__name__ in line, line

def test_a_long_number():
    line, status = refusal(fresh(), 'override', ['opt.lr=' + 400 * '9'])
    assert status == 2 and 'opt.lr' in line

@pytest.mark.parametrize('script, argument', [('mnist_fast', 'opt.batch_size=0'), ('fashion_fast', 'aug.cutout=99'),
                                              ('cifar_fast', 'opt.small_size=8')])
def test_a_wrong_value_ends_before_anything_is_loaded(folder, script, argument):
    line = fail(folder, 'data.name=Missing', 'data.dir=made', 'run.log=a.jsonl', argument, status=2,
                script=f'{script}.py')
    assert line.startswith(argument), line
    assert not (folder / 'made').exists() and not (folder / 'a.jsonl').exists()

def tiny_data(shape, count=100):
    """Random images of ten classes, for a script's build."""
    labels = torch.arange(count) % 10
    split = {'images': torch.randint(256, (count, *shape)).byte(), 'labels': labels}
    return {'train': split, 'test': split, 'classes': [*'0123456789']}

@pytest.mark.parametrize('script', SCRIPTS)
def test_both_ends_of_each_range_work(script):
    """A run of a tiny network takes them, one at a time."""
    ends = []
    for name, (value, lowest, highest) in ranges(script).items():
        if not name.startswith(('run.', 'data.')):
            ends.append((name, lowest))
            if highest == 'side':
                ends.append((name, min(fresh(script)['hyp']['data']['shape'][1:])))
            elif highest != 10**9 and name != 'opt.epochs':
                ends.append((name, type(value)(highest)))
    ends += [('data.shape', ranges(script)['data.shape'][1])]

    for name, value in ends:
        names = fresh(script)
        small = {'opt.epochs': 2.0, 'opt.batch_size': 25, 'net.widths': (4, 4, 4), name: value}
        if name == 'data.shape' and 'crop' in names['hyp']['net']:
            small['net.crop'] = 8
        names['override']([f'{key}={number}' for key, number in small.items()])
        train, net, preview = names['build'](tiny_data(names['hyp']['data']['shape']), torch.device('cpu'), None)
        result, losses = train(seed=0)
        assert result.shape == (3,) and 0 <= result[0] <= 1 and losses[0].isfinite(), (name, value)
        assert preview().isfinite().all(), (name, value)

# Data

def idx(array):
    """uint8 [n] or [n, 28, 28] in the format of MNIST's own files."""
    return struct.pack(f'>HBB{array.ndim}I', 0, 8, array.ndim, *array.shape) + array.numpy().tobytes()

def mnist_files():
    """MNIST in small -> the images and labels, and its files' contents by their names."""
    files, sent = {}, {}
    for split, part, size in (('train', 'train', 300), ('test', 't10k', 100)):
        images, labels = torch.randint(256, (size, 28, 28)).byte(), (torch.arange(size) % 10).byte()
        sent[split] = {'images': images[:, None], 'labels': labels.long()}
        files |= {f'{part}-images-idx3-ubyte': idx(images), f'{part}-labels-idx1-ubyte': idx(labels)}
    return sent, files

@needs_torchvision
def test_torchvision_fetches_what_is_missing(folder):
    sent, files = mnist_files()
    files = {f'{name}.gz': gzip.compress(content) for name, content in files.items()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(files[self.path.strip('/')])

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        resources = [(name, hashlib.md5(content).hexdigest()) for name, content in files.items()]
        mirror = torchvision_with(MNIST={'mirrors': [f'http://127.0.0.1:{server.server_port}/'],
                                         'resources': resources})
        # There is room for each file that torchvision downloads, but not for all images in one.
        out, err = finish(start(folder, LARGEST_FILE='280000', **mirror), status=1)
        server.shutdown()
    assert 'MNIST.pt' in err.splitlines()[-1] and 'summary' not in out
    assert not [path for path in folder.rglob('*') if path.suffix in ('.pt', '.part')]
    assert summary(run(folder, 'run.runs=1', **mirror))['runs'] == 1  # the server is down: from the downloaded files
    data = torch.load(folder / 'sets/MNIST.pt', weights_only=True)
    for split, key in itertools.product(sent, ('images', 'labels')):
        assert data[split][key].dtype == sent[split][key].dtype and torch.equal(data[split][key], sent[split][key])
    assert set(data) == {*sent, 'classes'} and [type(name) for name in data['classes']] == 10 * [str]
    assert not list(folder.rglob('*.part'))
    shutil.rmtree(folder / 'sets/MNIST')  # what torchvision downloaded
    assert summary(run(folder, 'run.runs=1'))['runs'] == 1

@needs_torchvision
def test_no_network_and_no_file(folder):
    with socket.socket() as unused:  # bound, but nobody listens
        unused.bind(('127.0.0.1', 0))
        mirror = f'http://127.0.0.1:{unused.getsockname()[1]}/'
        line = fail(folder, 'run.runs=1', 'data.dir=new/here',
                    **torchvision_with(MNIST={'mirrors': [mirror], 'resources': [('train-images.gz', '0')]}))
    assert 'here/MNIST.pt' in line and 'refused' in line and 'data.name=Synthetic' in line, line
    assert not [path for path in folder.rglob('*') if path.suffix in ('.pt', '.part', '.gz')]

@needs_torchvision
def test_a_raw_file_cut_short_is_named(folder):
    """So that the user can delete it; the others stay."""
    _, files = mnist_files()
    raw = folder / 'sets/MNIST/raw'
    raw.mkdir(parents=True)
    for name, keep in {'train-images-idx3-ubyte': 100_000, 't10k-images-idx3-ubyte': 10, 't10k-labels-idx1-ubyte': 90,
                       'train-labels-idx1-ubyte': 0}.items():
        for whole, content in files.items():
            (raw / whole).write_bytes(content)
        (raw / name).write_bytes(files[name][:keep])
        line = refuse(1)
        assert f'raw/{name}' in line and 'delete' in line, line
        assert not list(folder.rglob('*.pt')) and len(list(raw.iterdir())) == 4

class Harm:
    """A pickle that makes a folder as it is loaded."""
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)

def test_faulty_files(folder):
    """Each gets one line that names it and its fault, and is left as it was."""
    labels, harm = torch.arange(60) % 3, Harm(folder / 'harmed')
    good = make_set(labels, labels)

    def change(split, **values):
        return good | {split: good[split] | values}

    faults = {  # and what the line says of them
        'Foreign': (torch.zeros(3), ''),
        'Wide': (change('train', images=torch.zeros(60, 1, 32, 32).byte()), '32'),
        'Short': (change('train', labels=labels[:50]), '50'),
        'High': (change('test', labels=labels + 1), '3'),
        'Low': (change('train', labels=labels - 1), '-1'),
        'Harm': (good | {'classes': harm}, 'mkdir|code|pickle'), 'Pickle': (pickle.dumps(harm), ''),
        'Cut': (good, ''), 'Text': (b'no data here\n', ''),
    }
    paths = {name: folder / f'sets/{name}.pt' for name in faults}
    for name, (content, _) in faults.items():
        if type(content) is bytes:
            paths[name].write_bytes(content)
        else:
            torch.save(content, paths[name])
    paths['Cut'].write_bytes(paths['Cut'].read_bytes()[:-2000])
    before = [path.read_bytes() for path in paths.values()]
    lines = [refuse(1, f'data.name={name}') for name in faults]
    lines += [fail(folder, 'data.name=Harm'), fail(folder, 'data.name=Cut')]
    assert [path.read_bytes() for path in paths.values()] == before and set(folder.rglob('*.pt')) == set(paths.values())
    for name, line in zip([*faults, 'Harm', 'Cut'], lines):
        said = faults[name][1]
        _, path, fault = line.partition(f'sets/{name}.pt')
        assert path and re.search(said, fault) and 20 < len(fault) < 500, line
        assert 'weights_only' not in fault, line  # torch's advice to do without this protection is not for users
    assert not (folder / 'harmed').exists()
    torch.load(paths['Harm'], weights_only=False)
    assert (folder / 'harmed').exists()  # so the pickle was harmful

def test_a_faulty_source_becomes_no_pt(folder):
    """An .npz is named, and complained about again only while it is there."""
    labels = torch.arange(60) % 3
    good = make_set(labels, labels)
    faults = {'Few': ({'labels': labels[:50]}, '50'), 'Low': ({'labels': labels - 1}, '-1'),
              'Wide': ({'images': torch.randint(256, (60, 1, 32, 32)).byte()}, 'data.shape'),
              'Real': ({'images': torch.rand(60, 1, 28, 28)}, 'float')}
    for name, (change, _) in faults.items():
        save_npz(folder / f'sets/{name}.npz', good | {'train': good['train'] | change})
    for name, (_, said) in faults.items():
        line = refuse(1, f'data.name={name}')
        assert f'{name}.npz' in line and said in line, line
    assert sorted(path.suffix for path in (folder / 'sets').iterdir()) == len(faults) * ['.npz']
    save_npz(folder / 'sets/Few.npz', good)
    assert summary(say('data.name=Few', 'run.runs=1', 'opt.epochs=1'))['runs'] == 1

def test_holdout_is_a_fixed_draw_of_the_training_images(folder):
    """Of their own number, whatever the seed; the training images are the rest, and the test images are left alone."""
    labels = torch.arange(300) % 3
    data = make_set(labels, labels)
    data['train']['images'][:, 0, 0, 0] = torch.arange(300) // 2
    data['train']['images'][:, 0, 0, 1] = torch.arange(300) % 2
    torch.save(data, folder / 'sets/Mine.pt')
    drawn = []
    for script, seed, count in (('mnist_fast', 0, 100), ('mnist_fast', 7, 100), ('fashion_fast', 0, 100),
                                ('mnist_fast', 0, 299)):
        torch.manual_seed(seed)
        names = fresh(script)
        names['override'](['data.name=Mine', 'data.dir=sets', f'run.holdout={count}', f'run.seed={seed}'])
        found = names['load_data'](torch.device('cpu'))
        places = {}
        for split in ('train', 'test'):
            images = found[split]['images']
            places[split] = (2 * images[:, 0, 0, 0].long() + images[:, 0, 0, 1]).tolist()
            assert torch.equal(found[split]['labels'], labels[places[split]])
            assert torch.equal(images, data['train']['images'][places[split]])
        assert len(places['test']) == count and sorted(places['train'] + places['test']) == [*range(300)]
        drawn.append(set(places['test']))
    assert drawn[0] == drawn[1] == drawn[2]
    for third in (range(100), range(100, 200), range(200, 300)):
        assert 20 < len(drawn[0] & set(third)) < 50  # from everywhere
    assert 'run.holdout=300' in refuse(2, 'data.name=Mine', 'run.holdout=300')

@pytest.mark.parametrize('script', SCRIPTS)
def test_holdout_leaves_the_test_images_alone(folder, script):
    """They are not even in the file; the picture and the saved network do without them too."""
    names = internals(script)
    data = names['synthesize'](names['hyp']['data']['shape'])
    data = data | {'train': {key: values[:2000] for key, values in data['train'].items()}, 'test': None}
    torch.save(data, folder / 'sets/Mine.pt')
    small = () if script == 'mnist_fast' else ('net.widths=(8,16,16)', 'opt.batch_size=100')
    mine = 'data.name=Mine', 'opt.epochs=3', *small, 'run.runs=1'
    made = 'run.picture=a.png', 'run.save=a.pt2'
    out = say(*mine, 'run.holdout=100', *made, script=script)
    assert summary(out)['acc'] > 0.2 and (folder / 'a.png').exists() and (folder / 'a.pt2').exists()
    assert 'Mine.pt' in refuse(1, *mine, script=script)

def cifar_archive():
    """CIFAR-10's archive in small -> its bytes, what torchvision's class must know of it, the images, the labels."""
    random, batches, images, labels = torch.Generator().manual_seed(0), {}, {}, {}
    for name in [f'data_batch_{number}' for number in range(1, 6)] + ['test_batch']:
        images[name] = torch.randint(256, (40, 3, 32, 32), generator=random).byte()
        labels[name] = torch.randint(10, (40,), generator=random)
        batches[name] = {'data': images[name].flatten(1).numpy(), 'labels': labels[name].tolist()}
    batches['batches.meta'] = {'label_names': [f'class {number}' for number in range(10)]}
    file, md5 = io.BytesIO(), {}
    with tarfile.open(fileobj=file, mode='w:gz') as archive:
        for name, content in batches.items():
            content = pickle.dumps(content)
            entry = tarfile.TarInfo(f'cifar-10-batches-py/{name}')
            entry.size, md5[name] = len(content), hashlib.md5(content).hexdigest()
            archive.addfile(entry, io.BytesIO(content))
    known = {'tgz_md5': hashlib.md5(file.getvalue()).hexdigest(),
             'train_list': [[name, md5[name]] for name in md5 if name.startswith('data')],
             'test_list': [['test_batch', md5['test_batch']]],
             'meta': {'filename': 'batches.meta', 'key': 'label_names', 'md5': md5['batches.meta']}}
    return file.getvalue(), known, torch.cat([*images.values()]), torch.cat([*labels.values()])

@needs_torchvision
def test_mirrors(folder):
    """The mirror stalls, or is dead; torchvision's own server has the archive: broken, then whole."""
    content, known, images, labels = cifar_archive()
    served, stop = {'/good.tar.gz': content[:-9] + bytes(9)}, threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            if self.path in served:
                self.wfile.write(served[self.path])
            else:
                stop.wait()

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server, socket.socket() as unused:
        unused.bind(('127.0.0.1', 0))  # but nobody listens
        threading.Thread(target=server.serve_forever).start()
        address = f'http://127.0.0.1:{server.server_port}'
        text = (HERE / 'cifar_fast.py').read_text().replace('setdefaulttimeout(20)', 'setdefaulttimeout(1)')
        mirror = re.search(r'https://[\w./-]*dataset-mirror', text)[0]
        script, dead = folder / 'cifar_fast.py', f'http://127.0.0.1:{unused.getsockname()[1]}/dead'
        arguments = 'net.widths=(8,8,8)', 'run.runs=1', 'opt.epochs=1'
        torchvision = torchvision_with(CIFAR10={'url': f'{address}/good.tar.gz', **known})
        try:
            script.write_text(text.replace(mirror, f'{address}/stalls'))
            out, err = finish(start(folder, *arguments, script=script, **torchvision), status=1)
            assert 'sets/CIFAR10.pt' in err.splitlines()[-1] and 'summary' not in out
            assert not [path for path in folder.rglob('*') if path.suffix in ('.pt', '.part')]
            assert [line for line in out.splitlines() if 'stalls' in line and 'timed out' in line], out
            served['/good.tar.gz'] = content
            script.write_text(text.replace(mirror, dead))
            out, err = finish(start(folder, *arguments, script=script, **torchvision))
        finally:
            stop.set()
            server.shutdown()
    assert [line for line in out.splitlines() if 'dead' in line and 'refused' in line], out
    data = torch.load(folder / 'sets/CIFAR10.pt', weights_only=True)
    assert data['classes'] == [f'class {number}' for number in range(10)] and not list(folder.rglob('*.part'))
    for key, values in {'images': images, 'labels': labels}.items():
        found = torch.cat((data['train'][key], data['test'][key]))
        assert found.dtype == values.dtype and torch.equal(found, values), key

# Places and text

# The changed line's comment is in the letters of other languages; cp1252 has none of them.
NAMED = "'lr': within(0.24, 0),                # \u0418\u0432\u0430\u043d, \u674e\u660e, \u03a3\u03c9: lower"
NO_LOCALE = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}

def test_an_ascii_locale(finished, folder):
    """Letters that the locale does not have, in a forker's comment and in a log's name, go into the log and out again,
    and a console that lacks them gets the diff all the same."""
    text = (HERE / 'mnist_fast.py').read_text(encoding='utf-8')
    text = re.sub(r"'lr': within\(0\.\d+, 0\), +# [^\n]*", NAMED, text, count=1)
    script = folder / 'mnist_fast.py'
    script.write_text(text, encoding='utf-8')
    (folder / 'base.jsonl').write_text(finished[1])
    log = 'run.log=\u017curnal.jsonl'
    run(folder, *SYNTHETIC[:2], log, 'run.runs=2', script=script, **NO_LOCALE)
    (header,), lines = read_log(folder / '\u017curnal.jsonl')
    assert header['code'] == text and len(lines) == 2
    compare = 'run.runs=0', log, 'run.baseline=base.jsonl'
    for variables in ({'PYTHONIOENCODING': 'cp1252'}, NO_LOCALE, {'PYTHONIOENCODING': 'utf-8'}):
        out = run(folder, *compare, script=script, **variables)
        (line,) = [line for line in out.splitlines() if line.startswith('+') and ': lower' in line]
        assert summary(out)['runs'] == 2 and '0.24, 0),' in line
    assert line.endswith(NAMED)  # where the console has them

def test_from_standard_input_and_by_exec(folder):
    """As from a file; the log says that the code is not known."""
    script = HERE / 'mnist_fast.py'
    with script.open() as file:
        out, err = finish(start(folder, *SYNTHETIC, *TINY['mnist_fast'], 'run.runs=2', script=None, launcher=('-',),
                                stdin=file))
    assert summary(out)['runs'] == 2 and err == ''
    code = f'exec(open({str(script)!r}).read())'
    out, err = finish(start(folder, *SYNTHETIC, *TINY['mnist_fast'], 'run.runs=1', script=None, launcher=('-c', code)))
    assert summary(out)['runs'] == 1 and err == ''
    headers, lines = read_log(folder / 'log.jsonl')
    assert len(headers) == 2 and all('not known' in header['code'] for header in headers)
    assert lines[0]['curve'] == lines[2]['curve']
    with script.open() as file:
        out, err = finish(start(folder, 'opt.epochs=-1', script=None, launcher=('-',), stdin=file), status=2)
    assert err.startswith('opt.epochs=-1') and err.count('\n') == 1 and out == ''

def test_home_and_new_folders(folder):
    """~ is the home folder, and what is missing of a path is made."""
    labels = torch.arange(300) % 3
    (folder / 'home/sets').mkdir(parents=True)
    torch.save(make_set(labels, labels), folder / 'home/sets/Mine.pt')
    home = {'HOME': str(folder / 'home'), 'DATA_DIR': '~/sets'}
    outputs = 'run.log=~/logs/a.jsonl', 'run.save=~/nets/of/mine/a.pt2', 'run.picture=new/a.png'
    run(folder, 'data.name=Mine', 'run.runs=2', *outputs, **home)
    assert (folder / 'home/nets/of/mine/a.pt2').stat().st_size > 1000 and (folder / 'new/a.png').stat().st_size > 1000
    assert len(read_log(folder / 'home/logs/a.jsonl')[1]) == 2
    out = run(folder, 'run.runs=0', 'run.log=~/logs/a.jsonl', 'run.baseline=~/logs/a.jsonl', **home)
    assert summary(out)['runs'] == 2 and 'baseline  acc +0.00000' in out
    assert not (folder / '~').exists()

LIBC = ctypes.CDLL(None)

def hold_back():
    """Takes from a child of root what lets it write into any folder, as of a user who is not root."""
    prepare()
    if os.geteuid() == 0:
        LIBC.prctl(24, 1)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE

@pytest.fixture
def sealed(folder):
    """folder, whose sets can be read only."""
    probe = f'import os; print(os.access({str(folder / "sets")!r}, os.W_OK))'
    (folder / 'sets').chmod(0o555)
    said = finish(start(folder, script=None, launcher=('-c', probe), prepare=hold_back))[0]
    (folder / 'sets').chmod(0o755)
    if 'True' in said:
        pytest.skip('this user can write anywhere')
    yield folder
    (folder / 'sets').chmod(0o755)

def test_a_data_folder_that_cannot_be_written(sealed):
    """What is there is used, and no copy of it kept; what needs no folder runs; a folder in it is not made."""
    labels = torch.arange(300) % 3
    save_npz(sealed / 'sets/Mine.npz', make_set(labels, labels))
    (sealed / 'sets').chmod(0o555)
    out, err = finish(start(sealed, 'data.name=Mine', 'run.runs=1', prepare=hold_back))
    assert summary(out)['runs'] == 1 and err == '' and [*(sealed / 'sets').iterdir()] == [sealed / 'sets/Mine.npz']
    assert [line for line in out.splitlines() if 'sets' in line and 'Mine.pt' in line and 'not kept' in line], out
    line = fail(sealed, 'data.name=MNIST', 'data.dir=sets/new', prepare=hold_back)
    assert 'sets/new' in line and 'denied' in line, line
    line = fail(sealed, 'data.name=Synthetic', 'run.log=sets/a.jsonl', prepare=hold_back)
    assert 'sets/a.jsonl' in line and 'denied' in line, line
    out, _ = finish(start(sealed, *SYNTHETIC, 'data.dir=sets/new', 'run.runs=1', prepare=hold_back))
    assert summary(out)['runs'] == 1

@needs_torchvision
def test_torchvisions_images_in_a_folder_that_cannot_be_written(sealed):
    _, files = mnist_files()
    (sealed / 'sets/MNIST/raw').mkdir(parents=True)
    for name, content in files.items():
        (sealed / 'sets/MNIST/raw' / name).write_bytes(content)
    (sealed / 'sets').chmod(0o555)
    out, err = finish(start(sealed, 'run.runs=1', prepare=hold_back, **torchvision_with()))
    assert summary(out)['runs'] == 1 and err == ''
    assert [line for line in out.splitlines() if 'sets' in line and 'MNIST.pt' in line and 'not kept' in line], out

# Endings

@pytest.mark.parametrize('lines', [0, 3, 5])
def test_a_closed_pipe_ends_it_quietly(folder, lines):
    """As | head -n 3 closes it; what has finished is in the log."""
    process = start(folder, *SYNTHETIC, 'run.runs=1000')
    read = [process.stdout.readline() for _ in range(lines)]
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) != 0 and err == '' and all(line.endswith('\n') for line in read)
    assert len(read_log(folder / 'log.jsonl')[1]) < 1000

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='this system has no /dev/full')
def test_standard_output_on_a_full_disk(folder, finished):
    (folder / 'old.jsonl').write_text(finished[1])
    for arguments in ((*SYNTHETIC, 'run.runs=1'), ('run.runs=0', 'run.log=old.jsonl'), ('--help',)):
        with open('/dev/full', 'w') as full:
            _, err = finish(start(folder, *arguments, stdout=full), status=1)
        assert err.count('\n') == 1 and 'No space left' in err, (arguments, err)

def test_help(folder):
    out, err = finish(start(folder, '--help'))
    assert out.strip() == internals()['__doc__'].strip() and err == ''

def test_a_missing_library_is_found_before_training(folder):
    """Without a picture the network is saved all the same."""
    blocked = {'FIRST': 'import sys; sys.modules["PIL"] = None'}
    line = fail(folder, *SYNTHETIC, 'run.runs=1', 'run.save=a.pt2', 'run.picture=a.png', **blocked)
    assert 'run.picture=a.png' in line and 'PIL' in line, line
    assert {path.name for path in folder.iterdir()} <= {'sets', 'site', 'log.jsonl'}
    run(folder, *SYNTHETIC, 'run.runs=1', 'run.save=a.pt2', **blocked)
    assert (folder / 'a.pt2').stat().st_size > 1000

def test_outputs_that_cannot_be_made(folder):
    """Found before training, and no file or network is left behind."""
    (folder / 'file').write_text('here')
    for name in ('folder', 'folder.pt2', 'folder.png'):
        (folder / name).mkdir()
    suffixes = {'run.picture=p.xyz': '.png', 'run.picture=p': '.png', 'run.picture=p.png.txt': '.png',
                'run.save=model': '.pt2', 'run.save=model.pt': '.pt2', 'run.save=new/model.onnx': '.pt2'}
    for argument, suffix in suffixes.items():
        line = refuse(2, 'data.name=Synthetic', 'run.runs=1', argument)
        assert line.startswith(argument) and suffix in line, line
    places = {'run.log=folder': 'directory', 'run.save=folder.pt2': 'directory', 'run.picture=folder.png': 'directory',
              'run.log=file/a.jsonl': 'file/a.jsonl', 'run.picture=file/a.png': 'file/a.png',
              'run.save=file/a.pt2': 'file/a.pt2'}
    for argument, said in places.items():
        line = refuse(1, 'data.name=Synthetic', 'run.runs=1', 'run.save=b.pt2', argument)
        assert line.startswith(argument) and said in line, line
    for argument, status in (('run.save=model', 2), ('run.picture=file/a.png', 1)):
        assert fail(folder, 'data.name=Synthetic', argument, status=status).startswith(argument)
    assert {path.name for path in folder.iterdir()} == {'sets', 'site', 'file', 'folder', 'folder.pt2', 'folder.png'}

# What makes an output meet a full disk.
FULL = '''
import PIL.Image
import torch.export
def full(*arguments, **options):
    raise OSError(28, 'No space left on device')
OUTPUT.save = full
'''

@pytest.mark.parametrize('full, other, output', [('a.pt2', 'b.png', 'torch.export'),
                                                 ('b.png', 'a.pt2', 'PIL.Image.Image')])
def test_one_output_that_fails_does_not_take_the_other(folder, full, other, output):
    """On a full disk, after the summary."""
    made = 'run.save=a.pt2', 'run.picture=b.png'
    out, err = finish(start(folder, *SYNTHETIC, *made, 'opt.epochs=0.1', 'run.runs=1',
                            FIRST=FULL.replace('OUTPUT', output)), status=1)
    assert summary(out)['runs'] == 1 and err.count('\n') == 1 and full in err and other not in err, err
    assert 'No space left' in err and not (folder / full).exists()
    if other == 'a.pt2':
        assert torch.export.load(folder / 'a.pt2').module()(torch.zeros(3, 1, 28, 28).byte()).shape == (3, 10)
    else:
        check_picture(folder / 'b.png')

def test_no_half_output_stays(folder):
    """Where there is room for the log only; both are named."""
    made = 'run.save=a.pt2', 'run.picture=b.png'
    out, err = finish(start(folder, *SYNTHETIC, *made, 'opt.epochs=0.1', 'run.runs=1', LARGEST_FILE='80000'), status=1)
    assert summary(out)['runs'] == 1 and err.count('\n') == 1 and 'a.pt2' in err and 'b.png' in err, err
    assert not [path.name for path in folder.iterdir() if path.suffix in ('.pt2', '.png', '.part')]

# Logs

def test_a_damaged_log(finished, folder):
    """A line that is no line of a log costs itself alone: runs are added below it, and the rest is summarised."""
    header, first, second = finished[1].encode().splitlines()
    log = folder / 'log.jsonl'
    damaged = (b'\xef\xbb\xbf' + header + b'\r\n' + first + b'\r\n\r\n\n   \n' + bytes(700) + b'\n[1]\nnull\n"x"\n3\n'
               + b'{"a": 1}\nwords\n\xff\xfe\x80\n' + bytes(64) + second + b'\n' + second[:90])
    log.write_bytes(damaged)
    result = summary(say('run.runs=0', 'run.log=log.jsonl'))
    run(folder, *SYNTHETIC, 'run.runs=1', 'run.seed=9')
    assert log.read_bytes().startswith(damaged + b'\n{"session"') and log.read_bytes().endswith(b'}\n')
    again = summary(say('run.runs=0', 'run.log=log.jsonl', 'run.baseline=log.jsonl'))
    assert (result['runs'], again['runs']) == (2, 3)
    assert result['acc'] == summary(finished[0])['acc']

def test_a_log_that_two_starts_make_at_once(folder, monkeypatch):
    """Another start's first lines stay, whatever file has just been opened to see whether the log can be written."""
    log, opened = folder / 'log.jsonl', Path.open

    def meanwhile(path, *arguments):
        file = opened(path, *arguments)
        with opened(log, 'ab') as other:
            other.write(b'{"other": true}\n')
        return file

    names = load('mnist_fast', 'run.log=log.jsonl')
    monkeypatch.setattr(Path, 'open', meanwhile)
    names['append']({'other': False})
    monkeypatch.undo()
    assert [json.loads(line)['other'] for line in log.read_text().splitlines()] == [True, True, False]
    assert [path.name for path in folder.iterdir() if path.is_file()] == ['log.jsonl']

def test_sessions_are_unique(folder):
    """For two starts at one time, by processes of one number, as in two containers."""
    same = 'import os, time; os.getpid = lambda: 7; time.ctime = lambda: "noon"; time.time = lambda: 1e9'
    processes = [start(folder, *SYNTHETIC, *TINY['mnist_fast'], 'run.runs=1', FIRST=same) for _ in range(2)]
    for process in processes:
        finish(process)
    headers, lines = read_log(folder / 'log.jsonl')
    assert len({header['session'] for header in headers}) == len({line['session'] for line in lines}) == 2

def test_orthogonalization():
    """The singular vectors stay; the singular values come near 1, whatever the matrix was multiplied by."""
    random = torch.Generator().manual_seed(0)
    shapes = (32, 256), (64, 512), (32, 100), (10, 64), (32, 256)
    matrices = [torch.randn(shape, generator=random) for shape in shapes]
    for script in SCRIPTS:
        changes = [scale * x for scale, x in zip((1.0, 1e-4, 1e4, 1e4, 1e-4), matrices)]
        changes[1] = changes[1].view(64, 128, 2, 2).contiguous(memory_format=torch.channels_last)
        internals(script)['orthogonalize'](changes, torch.float32)
        for x, change in zip(matrices, changes, strict=True):
            left, _, right = torch.linalg.svd(x, full_matrices=False)
            values = left.T @ change.flatten(1) @ right.T
            assert 0.5 < values.diag().min() and values.diag().max() < 1.5
            assert (values - values.diag().diag()).abs().max() < 1e-3

def test_t_test():
    """Student's table, met by samples of df + 1 values and an exact one: of quantiles, and of the probability there."""
    table = {1: (3.0777, 6.3138, 31.8205, 63.6567), 2: (1.8856, 2.9200, 6.9646, 9.9248),
             9: (1.3830, 1.8331, 2.8214, 3.2498), 29: (1.3114, 1.6991, 2.4620, 2.7564),
             99: (1.2902, 1.6604, 2.3646, 2.6264)}
    for df, row in table.items():
        accs = [(-1)**number * (1 if number < df or df % 2 else 0) for number in range(df + 1)]
        mean, error = statistics.mean(accs), statistics.stdev(accs) / math.sqrt(df + 1)
        for p, t in zip((0.9, 0.95, 0.99, 0.995), row):
            difference, ci99, higher = internals()['t_test'](accs, [mean - t * error])
            assert difference == pytest.approx(t * error) and ci99 == pytest.approx(row[-1] * error, rel=1e-3)
            assert higher == pytest.approx(p, abs=1e-5)
            assert internals()['t_test'](accs, [mean + t * error])[2] == pytest.approx(1 - p, abs=1e-5)
        assert internals()['t_test'](accs, [mean])[2] == pytest.approx(0.5)
        assert internals()['t_test'](accs, [-1e9])[2] == pytest.approx(1)

def test_summary_by_hand(capsys):
    """With accuracies m - 0.0002, m, m + 0.0002: std 0.0002, standard error 0.0002 / sqrt(3) = 0.00011547, and the
    quantile of Student's t at 0.995 with 2 degrees of freedom is 9.9248, so ci99 is 0.00114602. Over the target of 0.99
    by 0.0012: t = 10.39, P = 1/2 + t / (2 sqrt(2 + t**2)) = 0.9954 > 0.99. By 0.0002: t = 1.732, P = 0.887. By 0.0006:
    t = 5.196, P = 0.982, where a normal distribution would say yes."""
    def line(*accs):
        times = (9.0, 1.0, 2.0)
        internals()['report']({}, [{'acc': acc, 'time_s': time_s} for acc, time_s in zip(accs, times)], None)
        return summary(capsys.readouterr().out)

    for mean, met in ((0.9912, 'yes'), (0.9902, 'open'), (0.9906, 'open'), (0.9888, 'no')):
        assert line(mean + 0.0002, mean - 0.0002, mean) == {
            'script': 'mnist_fast', 'runs': 3, 'acc': mean, 'std': 0.0002, 'ci99': 0.00115, 'time_s': 2.0,
            'target': 0.99, 'met': met}
    assert (line(0.992)['met'], line(0.992)['acc'], line(0.992)['time_s']) == ('open', 0.992, 9.0)
    assert (line(0.992, 0.992)['met'], line(0.988, 0.988)['met'], line(0.999, 0.998)['met']) == 3 * ('open',)
    assert (line(0.992, 0.992, 0.992)['met'], line(0.988, 0.988, 0.988)['met']) == ('yes', 'no')

def write_log(path, header, accs, old='', new='', **changes):
    """A log of runs with these accuracies, whose header is changed: values of hyp by dotted names, a piece of code."""
    assert old in header['code']
    header = json.loads(json.dumps(header | {'session': str(path), 'code': header['code'].replace(old, new)}))
    for name, value in changes.items():
        header['hyp'][name.split('.')[0]][name.split('.')[1]] = value
    lines = [{'session': str(path), 'seed': seed, 'acc': acc, 'time_s': 1.0} for seed, acc in enumerate(accs)]
    path.write_text(''.join(json.dumps(line) + '\n' for line in [header, *lines]))

def compare(new, base):
    """What run.runs=0 says of two logs -> numbers of the verdict's line, its words, the changed lines, the summary."""
    out = say('run.runs=0', f'run.log={new}.jsonl', f'run.baseline={base}.jsonl')
    form = r'baseline  acc ([+-]\d\.\d{5}) \+- (\d\.\d{5}) \(99 %\)  p=(\S+)  (.+)'
    line, *diff = out.splitlines()[:-1]
    *numbers, verdict = re.fullmatch(form, line).groups()
    changed = [line for line in diff if line[0] in '+-' and line[:3] not in ('+++', '---')]
    return [float(number) for number in numbers], verdict, changed, summary(out)

def test_baseline_by_hand(finished, folder):
    """0.991, 0.993, 0.995 after 0.990 to 0.993: means 0.993 and 0.9915, variances 4e-6 and 1.6667e-6, of the
    means 1.3333e-6 and 0.41667e-6; standard error sqrt(1.75e-6) = 0.00132288, t = 1.1339, degrees of freedom 1.75**2 /
    (1.3333**2 / 2 + 0.41667**2 / 3) = 3.2347, for which Student's t has 0.3338 outside of +- 1.1339 and 1 % outside of
    +- 5.4399 (from its incomplete beta function): +- 0.00720. With the second sample 0.02 lower it is better; the other
    way round it is worse."""
    header, code = finished[2], re.search(r"'epochs': within\([\d.]+, ", finished[2]['code'])[0]
    other_code = code.replace('within(', 'within(1')
    write_log(folder / 'base.jsonl', header, (0.990, 0.991, 0.992, 0.993))
    write_log(folder / 'low.jsonl', header, (0.970, 0.971, 0.972, 0.973))
    write_log(folder / 'new.jsonl', header, (0.991, 0.993, 0.995), code, other_code,
              **{'opt.lr': 0.3, 'run.log': 'new.jsonl', 'run.runs': 3})
    (difference, ci99, p), verdict, changed, result = compare('new', 'base')
    assert (difference, ci99) == (0.0015, pytest.approx(0.00720, abs=1.1e-5)) and p == pytest.approx(0.334, abs=0.007)
    needed = 4 * (1.5 * 5.4399 * 0.00132288 / 0.0015)**2
    said = int(re.fullmatch(r'open; about (\d+) runs of each would settle it', verdict)[1])
    assert said == pytest.approx(needed, abs=1) and result['runs'] == 3
    assert len(changed) == 4 and changed[2:] == ['-  "lr": 0.25,', '+  "lr": 0.3,']
    assert code in changed[0] and changed[0][0] == '-' and other_code in changed[1] and changed[1][0] == '+'
    (difference, _, p), verdict, _, _ = compare('new', 'low')
    assert difference == 0.0215 and 0.0001 < p < 0.001 and verdict == 'better'
    _, verdict, _, result = compare('low', 'new')
    assert verdict == 'worse' and result['runs'] == 4
    assert compare('low', 'base')[2] == []

def test_a_baseline_compares_what_stands_above_the_line(finished, folder):
    """A mended machinery is no change, nor are runs, places and files; a log of an older script can be read."""
    header = finished[2]
    write_log(folder / 'base.jsonl', header, (0.990, 0.991, 0.992, 0.993))
    write_log(folder / 'mended.jsonl', header, (0.990, 0.991), 'def t_test(', 'def mended_t_test(',
              **{'run.runs': 99, 'run.seed': 5, 'run.save': 'a.pt2', 'run.picture': 'a.png', 'run.device': 'cpu:0',
                 'run.target': 0.5, 'run.baseline': 'b.jsonl', 'run.log': '/c.jsonl', 'data.dir': '/sets'})
    assert compare('mended', 'base')[2] == []
    for key, value in {'run.dtype': 'float16', 'run.holdout': 9, 'data.name': 'KMNIST'}.items():
        write_log(folder / 'other.jsonl', header, (0.990, 0.991), **{key: value})
        changed = compare('other', 'base')[2]
        assert len(changed) == 2 and f'"{key.split(".")[1]}": {json.dumps(value)}' in changed[1], changed

    text = header['code'].partition(LINE)[0].replace('import types\n', '')
    old = header | {'code': f'{text}\n# the old machinery\n'}
    write_log(folder / 'old.jsonl', old, (0.990, 0.991, 0.995), **{'run.compile': False, 'opt.head_start': 0.25})
    _, _, changed, result = compare('old', 'base')
    assert '-import types' in changed and result['runs'] == 3
    _, _, changed, result = compare('base', 'old')
    assert '+import types' in changed and not any('compile' in line for line in changed) and result['runs'] == 4

def test_the_logs_behind_the_numbers_stay_readable():
    for path in sorted(HERE.glob('records/*/log.jsonl')):
        headers, lines = read_log(path)
        names = fresh(headers[-1]['script'])
        names['hyp']['run']['log'] = str(path)
        header, runs = names['read_log']('log')
        assert header == headers[-1] and 0 < len(runs) <= len(lines), path

def test_baseline_of_a_change(folder):
    """As a user works: a log, a change that hurts, its verdict."""
    few = *SYNTHETIC[:2], 'run.runs=4'
    say(*few, 'run.log=base.jsonl')
    out = run(folder, *few, 'opt.epochs=0.05', 'run.baseline=base.jsonl')
    assert re.search(r'^baseline  acc -0\.\d{5} .* worse$', out, re.M) and '+  "epochs": 0.05,' in out.splitlines()
    assert summary(out)['runs'] == 4

def test_no_runs_summarises_the_log(finished, folder):
    """The last start, and those of the same recipe and hyp, each seed once: neither of other epochs nor of another
    dtype nor of other code above the line."""
    header, (line, _) = finished[2:]

    def lines(session, accs, time_s, code=header['code'], dtype=header['hyp']['run']['dtype'], **opt):
        hyp = {'opt': header['hyp']['opt'] | opt, 'run': header['hyp']['run'] | {'dtype': dtype}}
        start = header | {'session': session, 'code': code, 'hyp': header['hyp'] | hyp}
        runs = [line | {'session': session, 'seed': seed, 'acc': acc, 'time_s': time_s} for seed, acc in accs.items()]
        return ''.join(json.dumps(line) + '\n' for line in [start, *runs])

    text = (lines('a', {0: 0.991, 1: 0.992}, 1.0) + lines('b', {0: 0.5, 3: 0.5}, 9.0, epochs=9.0)
            + lines('c', {0: 0.5, 4: 0.5}, 9.0, dtype='float16')
            + lines('d', {0: 0.5, 5: 0.5}, 9.0, code=header['code'].replace('F.relu(', 'F.gelu('))
            + lines('e', {1: 0.992, 2: 0.993}, 2.0, code=header['code'].replace('def t_test(', 'def mended_t_test(')))
    (folder / 'log.jsonl').write_text(text)
    result = summary(say('run.runs=0', 'run.log=log.jsonl'))
    assert (result['runs'], result['acc'], result['std'], result['time_s']) == (3, 0.992, 0.001, 2.0)
    assert (folder / 'log.jsonl').read_text() == text

def test_logs_that_cannot_be_used(finished, folder):
    """A path that cannot be written to, found before training; what cannot be summarised or compared with."""
    (folder / 'empty').write_text('')
    (folder / 'words').write_text('no log\n')
    (folder / 'header').write_text(finished[1].splitlines()[0] + '\n')
    write_log(folder / 'one', finished[2], [0.99])
    write_log(folder / 'other', finished[2] | {'script': 'cifar_fast'}, [0.99, 0.98, 0.97])
    write_log(folder / 'good', finished[2], [0.99, 0.98, 0.97])
    bad = 'empty', 'words', 'header', 'missing', 'other'
    cases = {('run.runs=0', f'run.log={name}'): name for name in bad}
    cases |= {(*arguments, f'run.baseline={name}'): name for name in (*bad, 'one')
              for arguments in ((), ('run.runs=0', 'run.log=good'))}
    cases |= {('run.log=/dev/full',): 'No space left'}
    for arguments, name in cases.items():
        line = refuse(1, 'data.name=Synthetic', *arguments)
        assert arguments[-1] in line and name in line, line
    assert 'run.log=words' in fail(folder, 'run.runs=0', 'run.log=words')
    assert 'run.log' in refuse(2, 'run.runs=0')

# Pictures and networks

# Runs of few steps, after which a network is still wrong on many images.
SHORT = {'mnist_fast': ('opt.epochs=0.1',), 'fashion_fast': (*SMALL[3:], 'opt.epochs=0.5'),
         'cifar_fast': (*SMALL[3:], 'opt.epochs=0.5')}

def check_picture(path):
    """Of the size that the docstring of draw states; each panel has words above it, and each of its images shows
    something, under words; where a panel has to have the network's look in orange it has, and nowhere else (the images
    are grey)."""
    pixels = bytearray(Image.open(path).convert('RGB').tobytes())
    picture = torch.frombuffer(pixels, dtype=torch.uint8).view(1304, 914, 3).float()
    for panel in range(4):
        title = picture[326 * panel + 4:326 * panel + 30]
        assert title.max() > 200 and title.min() == 0 and title.flatten(0, 1).std(1).max() == 0, panel
    for row, column in itertools.product(range(8), range(8)):
        top, left = 326 * (row // 2) + 34 + 146 * (row % 2), 2 + 114 * column
        tile, words = picture[top + 33:top + 143, left + 1:left + 111], picture[top + 1:top + 31, left + 1:left + 111]
        assert tile.std() > 10 and words.max() > 200 and words.min() == 0, (row, column)
        orange = (tile[..., 0] - tile[..., 2]).amax()
        assert orange > 60 if row in (2, 3, 6, 7) else orange == 0, (row, column)
        assert words.flatten(0, 1).std(1).max() == 0  # white on black

@pytest.mark.parametrize('script', SCRIPTS)
def test_the_picture(folder, script):
    data = internals()['synthesize']((1, 28, 28))
    if script == 'cifar_fast':
        for split in ('train', 'test'):
            data[split]['images'] = F.pad(data[split]['images'].expand(-1, 3, -1, -1), (2, 2, 2, 2))
    torch.save(data, folder / 'sets/Mine.pt')
    say('data.name=Mine', *SHORT[script], 'run.runs=1', 'run.picture=a.png', script=script)
    check_picture(folder / 'a.png')

@pytest.mark.parametrize('script, more', [*((script, ()) for script in SCRIPTS), ('fashion_fast', ('net.scale=1.43',))])
def test_the_saved_network(folder, script, more):
    """Gives float32 logits for any number of uint8 images, with the accuracy of the run, without the script; the file
    says what its classes and its images' shape are."""
    say(*SYNTHETIC, *SHORT[script], *more, 'run.runs=2', 'run.save=a.pt2', 'run.dtype=float32', script=script)
    (header,), (_, last) = read_log(folder / 'log.jsonl')
    extra = {'about.json': ''}
    net = torch.export.load(folder / 'a.pt2', extra_files=extra).module()
    shape = header['hyp']['data']['shape']
    assert json.loads(extra['about.json']) == {'classes': [*'0123456789'], 'shape': shape}
    split = internals()['synthesize'](shape)['test']
    for images in (split['images'][:1], split['images'][:7], split['images']):
        logits = net(images)
        assert logits.dtype == torch.float32 and logits.shape == (len(images), 10)
    acc = (logits.argmax(1) == split['labels']).float().mean()
    assert acc == pytest.approx(last['acc_plain'], abs=1e-6) and 0.11 < acc < 1
    assert (folder / 'a.pt2').stat().st_size < 2_000_000  # the weights, and no images

# Many processes

LOCAL = '-m', 'torch.distributed.run', '--local-addr=127.0.0.1', '--nproc-per-node=2'
TORCHRUN = *LOCAL, '--standalone'

def test_two_processes_share_the_runs(folder):
    """The same accuracies by seed as one process has, in one table and one summary; each writes its own runs."""
    out = run(folder, *SYNTHETIC, 'run.runs=5', 'run.seed=3', launcher=TORCHRUN)
    headers, lines = read_log(folder / 'log.jsonl')
    assert [header['threads'] for header in headers] == [1, 1]
    sessions = [{line['seed'] for line in lines if line['session'] == header['session']} for header in headers]
    assert sorted(sessions, key=len) == [{4, 6}, {3, 5, 7}]
    (folder / 'log.jsonl').unlink()
    alone = run(folder, *SYNTHETIC, 'run.runs=5', 'run.seed=3')
    for result in (summary(out), summary(alone)):
        assert (result['runs'], result['acc']) == (5, summary(alone)['acc'])
    columns = [re.findall(r'^ +(\d) +(\d) +([\d.]+) +([\d.]+) +([\d.]+) ', text, re.M) for text in (out, alone)]
    assert columns[0] == columns[1] and len(columns[0]) == 5
    _, others = read_log(folder / 'log.jsonl')
    results = [{(line['seed'], line['acc'], line['loss']) for line in found} for found in (lines, others)]
    assert results[0] == results[1] and len(results[0]) == 5

def test_a_killed_process_loses_no_finished_run(folder):
    process, log = start(folder, *SYNTHETIC, 'run.runs=1000', launcher=TORCHRUN), folder / 'log.jsonl'
    while not log.exists() or len({line['session'] for line in read_whole(log) if 'acc' in line}) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    pids = [int(header['session'].split(', ')[-1]) for header in read_whole(log) if 'hyp' in header]
    os.kill(pids[1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 1 and log.read_text().endswith('\n')
    headers, lines = read_log(log)
    assert len({line['session'] for line in lines}) == len(headers) == 2 and len(lines) < 1000
    assert summary(say('run.runs=0', 'run.log=log.jsonl'))['runs'] == len({line['seed'] for line in lines})

def test_two_machines(folder):
    """Each with a data folder of its own, in which its first process makes the data file."""
    labels = torch.arange(600) % 3
    with socket.socket() as unused:
        unused.bind(('127.0.0.1', 0))
        port = unused.getsockname()[1]
    nodes = []
    for node in range(2):
        place = folder / f'machine{node}'
        (place / 'sets').mkdir(parents=True)
        save_npz(place / 'sets/Mine.npz', make_set(labels, labels))
        launcher = *LOCAL, '--nnodes=2', f'--node-rank={node}', '--master-addr=127.0.0.1', f'--master-port={port}'
        nodes.append(start(place, 'data.name=Mine', 'run.runs=6', 'run.log=log.jsonl', launcher=launcher))
    out, others_out = (finish(process)[0] for process in nodes)
    assert summary(out)['runs'] == 6 and re.findall(r'^ +(\d) +\d +[01]', out, re.M) == [*'012345']
    assert 'summary' not in others_out
    seeds = []
    for node in range(2):
        headers, lines = read_log(folder / f'machine{node}/log.jsonl')
        seeds.append(sorted(line['seed'] for line in lines))
        assert len(headers) == 2 and (folder / f'machine{node}/sets/Mine.pt').exists()
        assert not list(folder.rglob('*.part'))
    assert sorted(seeds[0] + seeds[1]) == [*range(6)] and min(map(len, seeds)) >= 2

# What a cluster or a notebook leaves behind.
LEFT_BEHIND = [{'RANK': '1', 'WORLD_SIZE': '2', 'LOCAL_RANK': '1', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '9'},
               {'WORLD_SIZE': '2'}, {'RANK': '', 'WORLD_SIZE': '', 'LOCAL_RANK': ''},
               {'RANK': 'x', 'WORLD_SIZE': '-1', 'LOCAL_WORLD_SIZE': '8', 'GROUP_RANK': '3'}]

def test_variables_of_other_launchers_change_nothing(folder):
    with ThreadPoolExecutor(2) as pool:
        outs = list(pool.map(lambda left: run(folder, *SYNTHETIC, *TINY['mnist_fast'], 'run.runs=1', **left),
                             LEFT_BEHIND))
    assert [summary(out)['runs'] for out in outs] == len(LEFT_BEHIND) * [1]
    headers, lines = read_log(folder / 'log.jsonl')
    assert len({line['loss'] for line in lines}) == 1 and [header['threads'] for header in headers] == 4 * [1]

# torch.distributed as on Windows, and in a build that has none of it.
NO_STORE = '''
import torch
distributed = torch.distributed
def never(*arguments, **options):
    raise RuntimeError('a store was asked for')
for name in ('HashStore', 'TCPStore', 'FileStore', 'PrefixStore'):
    if name == 'HashStore':
        delattr(distributed, name)
    else:
        setattr(distributed, name, never)
distributed.rendezvous = distributed.init_process_group = never
'''
NO_DISTRIBUTED = '''
import torch
torch.distributed.is_available = lambda: False
del torch.distributed.is_torchelastic_launched, torch.distributed.rendezvous
'''

def test_a_single_process_needs_no_store(folder):
    for first in (NO_STORE, NO_DISTRIBUTED):
        out = run(folder, *SYNTHETIC, *TINY['mnist_fast'], 'run.runs=2', FIRST=first)
        assert summary(out)['runs'] == 2

# Devices

def test_wrong_devices(folder, monkeypatch):
    """The line has what there is."""
    names = fresh()
    missing = [] if torch.cuda.is_available() else ['cuda', 'cuda:3']
    for device in (*missing, 'gpu', 'meta', 'cpu:x', 'cpu cpu', 'tpu', '0'):
        names['hyp']['run']['device'] = device
        line, status = refusal(names, 'pick_device')
        assert status == 1 and f'run.device={device}' in line and 'cpu' in line.partition(device)[2], line
    for dtype in ('half', 'zzz', 'float64', 'int8', '', '16'):
        names['hyp']['run'] |= {'device': 'cpu', 'dtype': dtype}
        line, _ = refusal(names, 'pick_device')
        assert f'run.dtype={dtype}' in line, line
        assert all(kind in line for kind in ('auto', 'bfloat16', 'float16', 'float32')), line
    for argument, status in (('run.device=gpu', 1), ('run.dtype=half', 2)):
        assert argument in fail(folder, 'data.name=Synthetic', argument, status=status)

    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    names['hyp']['run'] |= {'device': 'cuda:7', 'dtype': 'auto'}
    line, _ = refusal(names, 'pick_device')
    assert 'run.device=cuda:7' in line and 'cpu' in line and 'cuda:0, cuda:1' in line, line

@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a card')
def test_a_process_takes_the_card_of_its_local_rank(monkeypatch):
    """In turn, where there are fewer cards."""
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 3)
    for local_rank, card in ((0, 0), (2, 2), (3, 0), (7, 1)):
        names = fresh()
        names |= {'WORLD': {'LOCAL_RANK': str(local_rank), 'LOCAL_WORLD_SIZE': '8'}}
        for device in ('auto', 'cuda'):
            names['hyp']['run']['device'] = device
            line, _ = refusal(names, 'pick_device')  # as there is none
            assert f'run.device=cuda:{card}:' in line, line

CARDS = {
    'bfloat16': [('NVIDIA A100-SXM4-80GB', (8, 0)), ('NVIDIA H100 80GB HBM3', (9, 0)), ('NVIDIA L4', (8, 9)),
                 ('NVIDIA GeForce RTX 3050', (8, 6)), ('NVIDIA B200', (10, 0)), ('NVIDIA GeForce RTX 5090', (12, 0))],
    'float16': [('Tesla T4', (7, 5)), ('NVIDIA T4G', (7, 5)), ('GRID T4-16Q', (7, 5)),
                ('NVIDIA GeForce RTX 2080', (7, 5)), ('NVIDIA TITAN RTX', (7, 5)), ('Quadro RTX 6000', (7, 5)),
                ('GRID RTX6000-8Q', (7, 5)), ('Tesla V100-SXM2-16GB', (7, 0)), ('NVIDIA TITAN V', (7, 0)),
                ('Xavier', (7, 2))],
    'float32': [('NVIDIA GeForce GTX 1660 Ti', (7, 5)), ('NVIDIA GeForce GTX 1650', (7, 5)),
                ('NVIDIA GeForce MX450', (7, 5)), ('NVIDIA T400 4GB', (7, 5)), ('NVIDIA T1000', (7, 5)),
                ('Quadro T2000', (7, 5)), ('Tesla P100-PCIE-16GB', (6, 0)), ('NVIDIA GeForce GTX 1080 Ti', (6, 1)),
                ('Tesla K80', (3, 7))]}

@pytest.mark.parametrize('dtype, card, capability', [(dtype, *card) for dtype in CARDS for card in CARDS[dtype]])
def test_the_fastest_dtype(monkeypatch, dtype, card, capability):
    """By a card's name where its capability does not say whether it has units for half precision."""
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device=None: card)
    assert internals()['fastest_dtype'](torch.device('cuda:0')) == dtype

@pytest.mark.parametrize('units, dtype', [
    ({'amx_bf16': True, 'avx512_bf16': False}, 'bfloat16'), ({'avx512_bf16': True}, 'bfloat16'),
    ({'bf16': True, 'neon': True}, 'bfloat16'), ({'avx512_bf16': False}, 'float32'), ({}, 'float32')])
def test_the_fastest_dtype_of_a_processor(monkeypatch, units, dtype):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: units, raising=False)
    assert internals()['fastest_dtype'](torch.device('cpu')) == dtype

def test_an_older_torch_cannot_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, 'get_capabilities', raising=False)
    assert internals()['fastest_dtype'](torch.device('cpu')) == 'float32'

def test_the_log_has_the_dtype_that_was_used(folder):
    for dtype in ('bfloat16', 'float32'):
        say(*SYNTHETIC, *TINY['mnist_fast'], 'run.runs=1', f'run.dtype={dtype}')
    headers, _ = read_log(folder / 'log.jsonl')
    assert [header['hyp']['run']['dtype'] for header in headers] == ['bfloat16', 'float32']
    assert summary(say('run.runs=0', 'run.log=log.jsonl'))['runs'] == 1  # they are no two runs of one recipe

# Leaves 24 GiB of addresses to a process.
FEW_ADDRESSES = 'import resource; resource.setrlimit(resource.RLIMIT_AS, (24 * 2**30,) * 2)'

@pytest.mark.skipif(sys.platform != 'linux', reason='no such limit')
def test_out_of_memory_is_one_line(folder):
    line = fail(folder, *SYNTHETIC, 'opt.candidates=100000000', 'run.runs=1', FIRST=FEW_ADDRESSES)
    assert 'memory' in line and 'opt.batch_size' in line and 'cpu' in line, line

@pytest.mark.parametrize('function', ['load_data', 'build'])
def test_a_card_that_is_full_is_one_line(folder, monkeypatch, function):
    """Whether the images do not fit or the network."""
    names = fresh()

    def full(*arguments):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')

    monkeypatch.setitem(names, function, full)
    monkeypatch.setattr(sys, 'argv', ['mnist_fast.py', 'data.name=Synthetic'])
    line, status = refusal(names, 'main')
    assert status == 1 and 'memory' in line, line

# Notebooks

# Runs cells as IPython does: their text is in linecache, the last error is kept, and open is IPython's own.
NOTEBOOK = '''
import _thread
import functools
import gc
import json
import linecache
import os
import sys
import threading
import time

cells = json.load(open('cells.json'))
sys.argv = ['ipykernel_launcher.py', '-f', '/x/kernel.json']

class Shell:
    def get_ipython(self):
        return self

@functools.wraps(open)
def open_file(*arguments, **options):
    return open(*arguments, **options)

names = {'__name__': '__main__', 'get_ipython': Shell().get_ipython, 'In': [''], 'open': open_file}

def run(name):
    for text in cells[name]:
        number = len(names['In'])
        file = [f'/nowhere/ipykernel_7/{number}.py', f'<ipython-input-{number}-0a1b2c>'][number % 2]
        linecache.cache[file] = len(text), None, text.splitlines(True), file
        names['In'].append(text)
        try:
            exec(compile(text, file, 'exec'), names)
        except BaseException as error:
            sys.last_value = error
            return error

say = {'good': [], 'held': [], 'shown': {}}

def run_again():
    say['good'].append(repr(run('good')))
    gc.collect()
    tensor = names['torch'].Tensor
    say['held'].append(sum(x.nbytes for x in gc.get_objects() if issubclass(type(x), tensor) and x.nbytes > 100_000))

def interrupt():
    while not os.path.exists('long.jsonl') or open('long.jsonl').read().count(chr(10)) < 2:
        time.sleep(0.005)
    _thread.interrupt_main()

run_again()
run_again()
for name in ('faulty', 'wrong', 'large'):
    say['shown'][name] = run(name)._render_traceback_()
    run_again()
threading.Thread(target=interrupt).start()
run('long')
run_again()
say['split'] = repr(run('split'))
json.dump(say, open('say.json', 'w'))
'''

@pytest.mark.parametrize('script, small', [('mnist_fast', {}), ('fashion_fast', {'widths': (4, 4, 4), 'epochs': 2.0}),
                                           ('cifar_fast', {'widths': (4, 4, 4), 'epochs': 2.0})])
def test_a_notebook(folder, script, small):
    """The script in one cell, edited there, runs again and again and frees what it held; in two cells it runs as well,
    and the log has the text of both."""
    whole = (HERE / f'{script}.py').read_text()

    def cell(text=whole, **values):
        for key, value in (small | values).items():
            text = re.sub(rf"('{key}': (?:within\()?)('\w*'|[\d.]+|\(.*?\))", rf'\g<1>{value!r}', text, count=1)
        return text

    labels = torch.arange(1000) % 3
    data = make_set(labels, labels[:300], script)
    torch.save(data, folder / 'sets/Mine.pt')
    torch.save(data | {'classes': ['ant', 'bee']}, folder / 'sets/Faulty.pt')
    log = {'name': 'Mine', 'runs': 1, 'log': 'log.jsonl'}
    cells = {'good': [cell(**log)], 'faulty': [cell(name='Faulty', log='log.jsonl')],
             'wrong': [cell(**log, batch_size=0)], 'large': [cell(**log, widths=3 * (10**6,))],
             'long': [cell(name='Mine', runs=1000, log='long.jsonl')]}
    recipe, _, machinery = whole.partition(LINE)
    changed = recipe.replace('net.zero_grad()\n', 'net.zero_grad()  # changed\n')
    cells['split'] = [cell(changed, **log), LINE + machinery]
    (folder / 'cells.json').write_text(json.dumps(cells))
    (folder / 'notebook.py').write_text(NOTEBOOK)
    out = run(folder, script=folder / 'notebook.py')
    say = json.loads((folder / 'say.json').read_text())
    headers, lines = read_log(folder / 'log.jsonl')
    headers = [header for header in headers if header['hyp']['net']['widths'] != 3 * [10**6]]
    assert say['good'] == 6 * ['None'] and len(headers) == len(lines) == 7
    assert all(header['code'] == cells['good'][0] for header in headers[:-1])
    assert all(line['curve'] == lines[0]['curve'] for line in lines)
    for name, said in (('faulty', 'Faulty.pt'), ('wrong', 'opt.batch_size=0'), ('large', 'memory')):
        (line,) = say['shown'][name]
        assert said in line and '\n' not in line
    runs = len(read_log(folder / 'long.jsonl')[1])
    assert re.search(rf'^summary .* runs={runs} ', out, re.M) and runs < 1000
    # Bytes of large tensors still alive after the first run, another, three errors, each with another, and Ctrl-C.
    assert max(say['held'][1:]) <= say['held'][0], say['held']

    assert say['split'] == 'None' and headers[-1]['code'] == ''.join(cells['split'])
    lines = [internals(script)['comparable'](header) for header in headers[-2:]]
    assert [line for line in difflib.ndiff(*lines) if line[0] in '+-'] == ['-     net.zero_grad()',
                                                                          '+     net.zero_grad()  # changed']

# The text of the scripts

def read_script(script):
    return (HERE / f'{script}.py').read_text(encoding='utf-8')

@pytest.mark.parametrize('name', [*SCRIPTS, 'test_smoke'])
def test_style(name):
    """One statement a line; a statement on its own is a call; one import a line; lines and functions are short."""
    text = read_script(name)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120 and '\t' not in text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt):
            before = lines[node.lineno - 1].encode()[:node.col_offset]
            assert before.isspace() or before == b'', f'line {node.lineno}: behind another statement or a colon'
        if isinstance(node, ast.Expr):
            is_text = isinstance(node.value, ast.Constant) and type(node.value.value) is str
            allowed = is_text or isinstance(node.value, (ast.Call, ast.Yield))
            assert allowed, f'line {node.lineno}: {type(node.value).__name__} as a statement'
        if isinstance(node, ast.Import):
            assert len(node.names) == 1, f'line {node.lineno}: imports in one line'
        if isinstance(node, ast.FunctionDef) and name in SCRIPTS:
            length = node.end_lineno - min([node.lineno, *(part.lineno for part in node.decorator_list)]) + 1
            assert length <= 60, f'{node.name} has {length} lines'

@pytest.mark.parametrize('text', ['a = b; c = d', 'if a: b()', 'if a:\n    b()\nelse: c()', 'with a: b()', 'a and b()',
                                  'a() if b else c()', 'a(), b()', 'import a, b', 'def a(): b()', 'for a in b: c()',
                                  'try: a()\nexcept B: c()', 'class A: b = 1', 'while a: b()', 'a', '[a() for a in b]',
                                  'def a():\n' + 60 * '    b()\n', 'a = ' + 60 * '1 + ' + '1'])
def test_what_is_no_style(monkeypatch, text):
    """The test above finds it."""
    monkeypatch.setattr(Path, 'read_text', lambda path, encoding=None: text)
    with pytest.raises(AssertionError):
        test_style('mnist_fast')

def test_the_order_of_a_script():
    """Nothing else looks like a banner."""
    for script in SCRIPTS:
        parts = re.split(r'^#{45}\n# +(\w+) +#\n#{45}\n', read_script(script), flags=re.M)
        assert parts[1::2] == ['Hyperparameters', 'Augmentation', 'Network', 'Optimizer', 'Training', 'Setup', 'Data',
                               'Reporting', 'Main'], script
        assert len(re.findall('^ *##', read_script(script), re.M)) == 2 * 9, script
        assert LINE in parts[2 * 5] and all(LINE not in part for part in parts[:2 * 5]), script

def test_the_machinery_is_the_same():
    """And short, as are the recipes."""
    machineries = set()
    for script in SCRIPTS:
        recipe, _, machinery = read_script(script).partition(f'{LINE};')
        machineries.add(machinery)
        lines = len(recipe.rstrip('-# \n').splitlines())
        assert 100 < lines <= RECIPE_LIMITS[script.removesuffix('_fast')], (script, lines)
        assert 100 < machinery.count('\n') <= MACHINERY_LIMIT, machinery.count('\n')
        assert not [other for other in SCRIPTS if re.search(rf'^(import|from) {other}', recipe + machinery, re.M)]
    assert len(machineries) == 1

def test_dependencies():
    """What uv reads at a script's head is what pip reads in requirements.txt."""
    wanted = (HERE / 'requirements.txt').read_text().splitlines()
    for script in SCRIPTS:
        (block,) = re.findall(r'^# /// script\n((?:#(?: .*)?\n)+?)# ///$', read_script(script), re.M)
        keys = dict(line.removeprefix('# ').split(' = ', 1) for line in block.splitlines())
        assert ast.literal_eval(keys['dependencies']) == wanted, script
        assert ast.literal_eval(keys['requires-python']) == '>=3.10' and set(keys) == {'dependencies',
                                                                                      'requires-python'}

# What the recipes are made of

def test_shift(monkeypatch):
    """Whole pixels, edges mirrored: two ramps show where a pixel is taken from; there, a slow look-up takes it too."""
    augment, crop, aug = (internals()[name] for name in ('augment', 'crop', 'hyp'))
    aug = aug['aug']
    images, index = torch.randint(256, (300, 1, 28, 28)).byte(), torch.randperm(300)
    assert aug['shift'] == 0 and torch.equal(augment(images, index), images[index])
    side = crop(images).shape[-1]
    assert side == internals()['hyp']['net']['crop'] and torch.equal(crop(images), images[..., 4:24, 4:24])
    monkeypatch.setitem(aug, 'shift', 7)
    ramp = (8 * torch.arange(28)).byte().expand(28, 28)
    torch.manual_seed(0)
    places = augment(torch.stack((ramp, ramp.T)).expand(300, -1, -1, -1), index) // 8  # [n, 2, 28, 28]: column, row
    moves = places[:, :, 14, 14].int() - 14
    assert {*moves[:, 0].tolist()} == {*moves[:, 1].tolist()} == {*range(-7, 8)}
    torch.manual_seed(0)
    shifted = augment(images, index)
    for number, (right, down) in enumerate(moves.tolist()):
        rows = [reflected(row + down, 27) for row in range(28)]
        columns = [reflected(column + right, 27) for column in range(28)]
        assert torch.equal(shifted[number, 0], images[index[number], 0][rows][:, columns])

def reflected(place, last):
    return -place if place < 0 else 2 * last - place if place > last else place

def test_augment():
    """Two ramps show where each pixel is taken from; there, a slow look-up takes it too."""
    augment = internals('cifar_fast')['augment']
    ramp = (4 * torch.arange(32)).byte().expand(32, 32)
    images = torch.randint(256, (500, 3, 32, 32)).byte()
    index, mirrored = torch.randperm(500), torch.rand(500) < 0.5
    torch.manual_seed(0)
    ramps = augment(torch.stack((ramp.T, ramp, ramp)).expand(500, -1, -1, -1), index, mirrored, (32, 32)) / 4
    down, right = ramps[:, 0, 16, 16] - 16, torch.where(mirrored, 15 - ramps[:, 1, 16, 16], ramps[:, 1, 16, 16] - 16)
    assert {*zip(down.tolist(), right.tolist())} == {*itertools.product(range(-2, 3), repeat=2)}
    torch.manual_seed(0)
    batch = augment(images, index, mirrored, (32, 32))
    assert batch.shape == (500, 3, 32, 32)
    for number in range(20):
        image = images[index[number]].flip(2) if mirrored[number] else images[index[number]]
        for row, column in itertools.product(range(32), range(32)):
            y, x = int(row + down[number]), int(column + right[number])
            y, x = -y if y < 0 else 62 - y if y > 31 else y, -x if x < 0 else 62 - x if x > 31 else x
            assert batch[number, :, row, column].tolist() == image[:, y, x].tolist()
    for size in (16, 16), (24, 20):
        torch.manual_seed(0)
        small = augment(images, index, mirrored, size)
        assert torch.allclose(small, F.interpolate(batch, size, mode='bilinear'), atol=1e-3)
    assert torch.allclose(F.interpolate(batch, (16, 16), mode='bilinear'), F.avg_pool2d(batch, 2), atol=1e-3)

def test_cutout(monkeypatch):
    """Each image loses one square, whole, at any place, to grey."""
    monkeypatch.setitem(internals('cifar_fast')['hyp']['aug'], 'cutout', 12)
    images, index = torch.full((1, 3, 32, 32), 200).byte(), torch.zeros(2000, dtype=torch.int64)
    blank = internals('cifar_fast')['augment'](images, index, index > 0, (32, 32)) == 120
    assert torch.equal(blank[:, 0], blank[:, 1]) and torch.equal(blank[:, 0], blank[:, 2])
    corners = check_squares(blank, 12)
    assert {row for row, _ in corners} == {column for _, column in corners} == {*range(21)}

def test_fashion_augment(monkeypatch):
    """As test_augment, for fashion_fast.py, which mirrors by a draw of its own and blacks out a square."""
    augment, aug = internals('fashion_fast')['augment'], internals('fashion_fast')['hyp']['aug']
    monkeypatch.setitem(aug, 'shift', 2)
    ramp = (4 * torch.arange(28)).byte().expand(28, 28)
    images, index = torch.randint(1, 256, (500, 1, 28, 28)).byte(), torch.randperm(500)
    torch.manual_seed(0)
    down = augment(ramp.T.expand(500, 1, -1, -1), index)[:, 0, 14, 14] / 4 - 14
    torch.manual_seed(0)
    middle = augment(ramp.expand(500, 1, -1, -1), index)[:, 0, 14, 14:16] / 4
    mirrored = middle[:, 0] > middle[:, 1]
    right = torch.where(mirrored, 13 - middle[:, 0], middle[:, 0] - 14)
    assert {*zip(down.tolist(), right.tolist())} == {*itertools.product(range(-2, 3), repeat=2)}
    assert 200 < mirrored.sum() < 300
    torch.manual_seed(0)
    batch = augment(images, index)
    assert batch.shape == (500, 1, 28, 28)
    for number in range(20):
        image = images[index[number], 0].flip(1) if mirrored[number] else images[index[number], 0]
        for row, column in itertools.product(range(28), range(28)):
            y, x = int(row + down[number]), int(column + right[number])
            y, x = -y if y < 0 else 54 - y if y > 27 else y, -x if x < 0 else 54 - x if x > 27 else x
            assert batch[number, 0, row, column] == image[y, x]
    for key, value in {'flip': False, 'shift': 0, 'cutout': 8}.items():
        monkeypatch.setitem(aug, key, value)
    batch = augment(images, index)
    assert torch.equal(batch[batch > 0], images[index][batch > 0].float())
    corners = check_squares(batch == 0, 8)
    assert len(corners) > 250 and {row for row, _ in corners} == {column for _, column in corners} == {*range(21)}
    for key in aug:
        monkeypatch.setitem(aug, key, 0)
    assert torch.equal(augment(images, index), images[index].float())

def check_squares(blank, size):
    """bool [n, 1, H, W], each image with one blank square of that size -> the set of their corners."""
    corners = set()
    for image in blank[:, 0]:
        rows, columns = image.any(1).nonzero()[:, 0], image.any(0).nonzero()[:, 0]
        assert image.sum() == size**2 and len(rows) == len(columns) == size
        assert rows[-1] - rows[0] == columns[-1] - columns[0] == size - 1
        corners.add((rows[0].item(), columns[0].item()))
    return corners

def test_candidates(monkeypatch):
    """Of the images that a step of fashion_fast.py draws it learns from those it has not seen, then from those whose
    loss was highest when last seen."""
    names, draws, batches, losses = internals('fashion_fast'), [], [], []

    def randint(*arguments, randint=torch.randint, **options):
        values = randint(*arguments, **options)
        draws.extend([values.tolist()] if values.ndim == 1 else [])
        return values

    def augment(images, index, augment=names['augment']):
        batches.append(index.tolist())
        return augment(images, index)

    def cross_entropy(*arguments, cross_entropy=F.cross_entropy, **options):
        loss = cross_entropy(*arguments, **options)
        losses.extend([loss.tolist()] if loss.ndim else [])
        return loss

    data = tiny_data((1, 28, 28), 400)
    monkeypatch.setattr(torch, 'randint', randint)
    monkeypatch.setitem(names, 'augment', augment)
    monkeypatch.setattr(F, 'cross_entropy', cross_entropy)
    monkeypatch.setitem(names['hyp']['net'], 'widths', (4, 4, 4))
    monkeypatch.setitem(names['hyp']['aug'], 'flip', False)
    for key, value in {'epochs': 3.0, 'batch_size': 20, 'candidates': 3.0}.items():
        monkeypatch.setitem(names['hyp']['opt'], key, value)
    train, *_ = names['build'](data, torch.device('cpu'), None)
    train(seed=0)
    assert len(draws) == len(batches) == len(losses) == 60 and {len(draw) for draw in draws} == {60}
    assert len({image for draw in draws for image in draw}) > 390
    last_losses = dict.fromkeys(range(400), math.inf)
    for drawn, batch, loss in zip(draws, batches, losses, strict=True):
        expected = sorted((last_losses[image] for image in drawn), reverse=True)[:20]
        assert sorted((last_losses[image] for image in batch), reverse=True) == expected and {*batch} <= {*drawn}
        last_losses |= dict(zip(batch, loss))

def watch_training(monkeypatch, images, **opt):
    """A function that runs a tiny network of cifar_fast.py over random images -> a list of (image, mirrored, loss)."""
    names, seen, losses = internals('cifar_fast'), [], []

    def augment(images, index, mirrored, size, augment=names['augment']):
        seen.extend(zip(index.tolist(), mirrored.tolist()))
        return augment(images, index, mirrored, size)

    def cross_entropy(*arguments, cross_entropy=F.cross_entropy, **options):
        loss = cross_entropy(*arguments, **options)
        losses.extend(loss.tolist() if loss.ndim else [])
        return loss

    monkeypatch.setitem(names, 'augment', augment)
    monkeypatch.setattr(F, 'cross_entropy', cross_entropy)
    monkeypatch.setitem(names['hyp']['net'], 'widths', (4, 4, 4))
    for key, value in opt.items():
        monkeypatch.setitem(names['hyp']['opt'], key, value)
    train, *_ = names['build'](tiny_data((3, 32, 32), images), torch.device('cpu'), None)
    train(seed=0)
    return [(image, way, loss) for (image, way), loss in zip(seen, losses, strict=True)]

def test_alternating_flip(monkeypatch):
    """In two passes each image is seen once each way, in an order that changes."""
    seen = [row[:2] for row in watch_training(monkeypatch, 200, epochs=2.0, full_passes=2, batch_size=50)]
    assert len(seen) == 400 and sorted(seen) == [(image, way) for image in range(200) for way in (False, True)]
    first, second = [[image for image, _ in part] for part in (seen[:200], seen[200:])]
    assert sorted(first) == sorted(second) and first != second
    assert 60 < sum(way for _, way in seen[:200]) < 140
    monkeypatch.setitem(internals('cifar_fast')['hyp']['aug'], 'flip', False)
    seen = watch_training(monkeypatch, 200, epochs=2.0, full_passes=2, batch_size=50)
    assert len(seen) == 400 and not any(way for _, way, _ in seen)

def test_hard_images(monkeypatch):
    """After the full passes, each pass has the images whose loss was highest when last seen, in batches of a size."""
    seen = watch_training(monkeypatch, 200, epochs=2.0, full_passes=1, hard_share=0.5, batch_size=40)
    passes = seen[:200], seen[200:280], seen[280:360], seen[360:]  # of 100 images, 80 make whole batches
    assert len(passes[-1]) == 40 and len({image for image, *_ in passes[0]}) == 200
    last_losses = {image: loss for image, _, loss in passes[0]}
    for part in passes[1:]:
        hardest = sorted(last_losses, key=last_losses.get)[-100:]
        images = [image for image, *_ in part]
        assert len(set(images)) == len(images) and set(images) <= set(hardest)
        last_losses |= {image: loss for image, _, loss in part}
    assert {image for image, *_ in passes[1]} != {image for image, *_ in passes[2]}

def test_linear_classifier(monkeypatch):
    """The images that mnist_fast.py learns from first are those that linear regression fits worst, in any order."""
    names = internals('mnist_fast')
    monkeypatch.setitem(names['hyp']['opt'], 'hard_share', 0.25)
    random = torch.Generator().manual_seed(0)
    for size in 28, 33:
        patterns = torch.rand(4, 1, size, size, generator=random)
        labels = torch.arange(400) // 100
        images = (200 * patterns[labels] + 50 * torch.rand(400, 1, size, size, generator=random)).byte()
        wrong = torch.randperm(400, generator=random)[:60]
        labels[wrong] = (labels[wrong] + 1) % 4
        hard = names['hard_images'](images, labels, F.one_hot(labels).float())
        assert len(hard) == len(hard.unique()) == 100 and set(wrong.tolist()) <= set(hard.tolist())

@pytest.mark.parametrize('share', [0, 0.5, 1])
def test_first_pass(monkeypatch, share):
    """mnist_fast.py draws the hardest images once, then all, each once."""
    names = internals('mnist_fast')
    for key, value in {'hard_share': share, 'batch_size': 20, 'candidates': 1, 'epochs': 1.1}.items():
        monkeypatch.setitem(names['hyp']['opt'], key, value)
    images = torch.randint(256, (200, 1, 28, 28)).byte()
    labels = torch.arange(200) % 10
    data = {'images': images, 'labels': labels}
    drawn = []
    step = names['train_step']

    def watched(net, state, *arguments):
        drawn.extend(state.order[state.position + state.offsets].tolist())
        step(net, state, *arguments)

    monkeypatch.setitem(names, 'train_step', watched)
    build = names['build']({'train': data, 'test': data, 'classes': [*'0123456789']}, torch.device('cpu'), None)
    build[0](0)
    hard = names['hard_images'](images, labels, names['smooth'](labels, 10)).tolist()
    assert len(drawn) == 220 and set(drawn[:len(hard)]) == set(hard)
    rest = drawn[len(hard):]
    assert len(set(rest[:200])) == min(200, len(rest))

def test_whitening():
    """What the first layer makes of the images' patches has the identity as its second moments, sign for sign."""
    names = internals('cifar_fast')
    net = names['Net'](10)
    images = (128 + 150 * F.avg_pool2d(torch.randn(200, 3, 36, 36), 5, 1)).byte()  # neighbours are alike
    names['init_weights'](net)
    names['init_whitening'](net, images)
    normal = (images - net.mean) / net.std
    images = images.float()
    images = (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)
    assert torch.allclose(normal, images, atol=1e-4)
    x = F.conv2d(images, net.whiten.weight).transpose(0, 1).flatten(1)
    assert torch.equal(x[:12], -x[12:])
    patches = F.unfold(images, 2).transpose(0, 1).flatten(1)
    variances = torch.linalg.eigvalsh(patches @ patches.T / patches.shape[1])
    assert variances.min() > 0.005  # against the 0.0005 that is added to them
    moments = x[:12] @ x[:12].T / x.shape[1]
    assert torch.allclose(moments, (variances / (variances + 5e-4)).diag(), atol=2e-3)
    assert torch.allclose(moments, torch.eye(12), atol=0.1)

@pytest.mark.parametrize('script', ('fashion_fast', 'cifar_fast'))
@pytest.mark.parametrize('size', ((1, 1), (2, 2), (3, 3), (2, 4), (3, 2), (1, 9), (4, 4)))
def test_conv3x3(script, size):
    """Small maps' matrix products are the convolution, forward and backward, without the padding's arithmetic."""
    conv3x3 = internals(script)['conv3x3']
    images = torch.randn(3, 5, *size, dtype=torch.float64, requires_grad=True)
    filters = torch.randn(7, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    expected, found = F.conv2d(images, filters, padding=1), conv3x3(images, filters)
    assert found.shape == expected.shape and torch.allclose(found, expected)
    weights = torch.randn_like(expected)
    for mine, theirs in zip(torch.autograd.grad((found * weights).sum(), (images, filters)),
                            torch.autograd.grad((expected * weights).sum(), (images, filters))):
        assert torch.allclose(mine, theirs)
    with FlopCounterMode(display=False) as counter:
        conv3x3(images, filters)
    used = math.prod(3 * side - 2 if math.prod(size) <= 9 else 3 * side for side in size)  # taps, of all pixels
    assert counter.get_total_flops() == 2 * 3 * 5 * 7 * used

@pytest.mark.parametrize('script', SCRIPTS)
def test_optimizer(script):
    """Nesterov momentum, SGD and Muon against torch.optim.SGD, in steps of one learning rate."""
    names = internals(script)
    opt = names['hyp']['opt']
    random = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=random) for shape in ((6, 4, 3, 3), (5, 3), (7,))]
    mine = [torch.nn.Parameter(weight.clone()) for weight in start]
    theirs = [torch.nn.Parameter(weight.clone()) for weight in start]
    frozen = torch.nn.Parameter(torch.ones(4))
    groups = [(weight, torch.zeros_like(weight), 0.1, weight.ndim == 4) for weight in mine]
    momentum = opt['sgd_momentum'] if script == 'cifar_fast' else opt['momentum']
    decay = opt['weight_decay'] if script == 'cifar_fast' else 0.0
    sgd = torch.optim.SGD(theirs[1:], lr=0.5 * 0.1, momentum=momentum, nesterov=True)
    for step in range(3):
        for weight, other in zip(mine, theirs):
            weight.grad = torch.randn(weight.shape, generator=random)
            other.grad = weight.grad.clone()
        with torch.no_grad():
            torch._foreach_mul_(theirs[1:], 1 - 0.5 * decay)
        names['update']([*groups, (frozen, torch.zeros(4), 0.1, False)], torch.tensor(0.5), torch.float32)
        sgd.step()
        if step == 0:
            change = [theirs[0].grad.clone()]
            names['orthogonalize'](change, torch.float32)  # of the first step's momentum, a multiple of the gradient
            before = start[0] if script == 'mnist_fast' else start[0] * 6**0.5 / start[0].norm()
            assert torch.allclose(mine[0], before - 0.5 * 0.1 * change[0], atol=1e-5)
    for weight, other in zip(mine[1:], theirs[1:]):
        assert torch.allclose(weight, other, atol=1e-5)
    assert torch.equal(frozen, torch.ones(4))  # it has no gradient

class Linear(torch.nn.Module):
    """Pixels -> logits of ten classes, by random weights."""
    def __init__(self, shape):
        super().__init__()
        self.weight = torch.randn(10, math.prod(shape), generator=torch.Generator().manual_seed(0)) / 3000

    def forward(self, images):
        return images.float().flatten(1) @ self.weight.T

def moved(images, down, right):
    """Images moved by up to a pixel, with their edges mirrored, by the book."""
    height, width = images.shape[2:]
    rows = [abs(row) if row < height else 2 * height - 2 - row for row in range(-down, height - down)]
    columns = [abs(column) if column < width else 2 * width - 2 - column for column in range(-right, width - right)]
    return images[:, :, rows][..., columns]

@pytest.mark.parametrize('script', SCRIPTS)
@pytest.mark.parametrize('flip', [False, True])
@pytest.mark.parametrize('shift', [0, 2])
def test_views(monkeypatch, script, flip, shift):
    """The quarter of the images whose first two classes are nearest gets the mean of its views' probabilities."""
    names = internals(script)
    monkeypatch.setitem(names['hyp']['tta'], 'share', 0.25)
    monkeypatch.setitem(names['hyp']['aug'], 'shift', shift)
    if script != 'mnist_fast':
        monkeypatch.setitem(names['hyp']['aug'], 'flip', flip)
    shape = names['hyp']['data']['shape']
    test = tiny_data(shape, 200)['test']
    images, labels = test['images'], test['labels']
    net, result = Linear(shape), torch.zeros(3)
    state = types.SimpleNamespace(weights=[torch.zeros(1)], average=[torch.ones(1)], result=result,
                                  autocast=contextlib.nullcontext())
    names['evaluate'](net, state, {'test': test})

    probabilities = net(images).softmax(1)
    first, second = probabilities.sort(1).values[:, -2:].T
    uncertain = (first - second).abs().argsort()[:math.ceil(len(labels) / 4)]
    if script == 'cifar_fast':
        views = [images, moved(images, 1, 1), moved(images, -1, -1)] if shift else [images]
    else:
        moves = (-1, 0), (0, -1), (0, 1), (1, 0)
        views = [images, *(images.roll(move, (2, 3)) for move in moves)]
    if script != 'mnist_fast' and flip:
        views += [view.flip(3) for view in views]
    mean = sum(net(view).softmax(1) for view in views) / len(views)
    answers = probabilities.argmax(1)
    answers[uncertain] = mean[uncertain].argmax(1)
    assert result[0] == pytest.approx((answers == labels).float().mean().item(), abs=1e-6)
    assert result[1] == pytest.approx((net(images).argmax(1) == labels).float().mean().item(), abs=1e-6)
    assert result[2] == pytest.approx(F.cross_entropy(net(images), labels).item(), rel=1e-5)
    assert torch.equal(state.weights[0], torch.ones(1))  # the averages are tested

# README

def snippets():
    """The Python blocks of README.md, by the name in the comment before each."""
    text = (HERE / 'README.md').read_text(encoding='utf-8')
    return dict(re.findall(r'<!-- snippet: (.+?) -->\n```python\n(.+?)```', text, re.S))

def test_readme_counts_the_compute(folder):
    """One step of 1000 images and a test of 2000, by hand: a convolution's backward pass is two of its forward passes,
    for the weights and for the inputs, where both are needed."""
    (folder / 'count.py').write_text(snippets()['compute'])
    shutil.copy(HERE / 'cifar_fast.py', folder)
    small = 'net.widths=(8,8,16)', 'opt.epochs=1e-5', 'opt.batch_size=1000', 'tta.share=1e-5'
    out, _ = finish(start(folder, 'data.name=Synthetic', *small, script=folder / 'count.py'))
    whiten, first = 2 * 12 * 24 * 31**2, 2 * 4 * 24 * 8 * 30**2
    rest = 2 * 4 * (8 * 8 * 14**2 + 8 * 16 * 6**2) + 2 * 9 * (8 * 8 * 15**2 + 8 * 8 * 7**2 + 16 * 16 * 3**2)
    rest += 2 * 16 * 10  # the last layer
    expected = (1000 + 2000 + 6) * (whiten + first + rest) + 1000 * (first + 2 * rest)
    expected += 2 * 12 * 12 * 31**2 * 1000  # the patches' moments
    assert float(out.splitlines()[-1].split()[0]) * 1e15 == pytest.approx(expected, rel=0.02)

def test_readme_reads_a_log(folder, finished):
    """The snippet prints the mean of the runs in a log; where matplotlib is, the other draws their curves."""
    _, text, _, lines = finished
    (folder / 'mnist.jsonl').write_text(text)
    has_matplotlib = importlib.util.find_spec('matplotlib') is not None
    (folder / 'read.py').write_text(snippets()['read'] + (snippets()['curves'] if has_matplotlib else ''))
    out, _ = finish(start(folder, script=folder / 'read.py', MPLBACKEND='Agg'))
    assert out.strip() == f'2 runs, mean accuracy {sum(line["acc"] for line in lines) / 2}'
    assert (folder / 'curves.png').exists() == has_matplotlib

CPU = torch.device('cpu')

def load(script='mnist_fast', *arguments):
    """The names of a script, fresh, with these values of hyp; nothing has run."""
    names = fresh(script)
    names['override'](arguments)
    return names

def main(monkeypatch, capsys, script, *arguments):
    """As `python SCRIPT.py run.device=cpu ARGUMENTS`, in this process -> stdout."""
    names = load(script)
    monkeypatch.setattr(sys, 'argv', [f'{script}.py', 'run.device=cpu', *arguments])
    capsys.readouterr()
    names['main']()
    return capsys.readouterr().out

@functools.cache
def generated(shape):
    return load()['synthesize'](shape)

def sample(names, n=240):
    """n training images that a network can learn, and half as many of the test, in memory of their own."""
    data = generated(names['hyp']['data']['shape'])
    sizes = {'train': n, 'test': n // 2}
    return {'classes': data['classes'],
            **{split: {key: x[:size].clone() for key, x in data[split].items()} for split, size in sizes.items()}}

# A GPU's rules, rehearsed on a CPU.

WAITS = {'_local_scalar_dense', 'is_nonzero', 'nonzero', 'masked_select', 'equal', '_unique2', 'unique_dim', 'bincount'}

class Tape(TorchDispatchMode):
    """Notes the operations of a call and the memory that each reads and writes, as the capture of a CUDA graph."""
    def __init__(self):
        super().__init__()
        self.calls = []
        self.made = set()  # addresses of what the call made
        self.read = {}  # of what it only read, by address: whether that is still alive, and words for it

    def __torch_dispatch__(self, operation, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation.overloadpacket.__name__
        masks = []
        if 'index' in name and isinstance(args[1], list | tuple):
            masks = [x for x in args[1] if x is not None and x.dtype == torch.bool]
        if masks or name in WAITS:
            raise RuntimeError(f'{name} waits for the device inside of a capture')

        for x in tree_leaves((args, kwargs)):
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in self.made:
                storage, words = x.untyped_storage(), f'{name} reads {list(x.shape)} of {x.dtype}'
                self.read.setdefault(storage.data_ptr(), (StorageWeakRef(storage), words))
        outputs = operation(*args, **kwargs)
        addresses = {x.untyped_storage().data_ptr() for x in tree_leaves(outputs) if torch.is_tensor(x)}
        self.made |= addresses - set(self.read)
        self.calls.append((operation, args, kwargs, outputs))  # what it holds keeps its address
        return outputs

class Graph:
    """Stands in for torch.cuda.CUDAGraph: replay() repeats the operations at the same addresses."""
    def __init__(self):
        self.tape = Tape()
        self.replays = 0

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for operation, args, kwargs, outputs in self.tape.calls:
            again = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

class Stream:
    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass

@pytest.fixture
def graphs(monkeypatch):
    """A CPU with CUDA's calls for graphs -> the graphs that are made."""
    made = []

    def new_graph():
        made.append(Graph())
        return made[-1]

    @contextlib.contextmanager
    def capturing(graph, pool=None, stream=None):
        graph.place = pool, stream
        with graph.tape:
            yield

    stand_ins = {'CUDAGraph': new_graph, 'graph': capturing, 'Stream': Stream, 'current_stream': Stream,
                 'stream': lambda stream: contextlib.nullcontext(), 'graph_pool_handle': lambda: object(),
                 'is_available': lambda: True, 'synchronize': lambda *rest: None}
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return made

def on_a_gpu(names):
    """Lets a script's capture() make graphs."""
    capture = names['capture']
    gpu = types.SimpleNamespace(type='cuda')
    names['capture'] = lambda function, device, counters: capture(function, gpu, counters)
    return names

def freed(names, graphs, dtype=None):
    """What graphs read that is gone once build has returned: a graph holds addresses, not tensors."""
    graphs.clear()
    train = names['build'](sample(names), CPU, dtype)[0]
    for graph in graphs:
        graph.tape.calls.clear()
    gc.collect()
    assert graphs and train
    return [words for graph in graphs for storage, words in graph.tape.read.values() if storage.expired()]

def two_runs(names, dtype=None):
    """Results, losses and weights of two seeds."""
    train, net, _ = names['build'](sample(names), CPU, dtype)
    found = []
    for seed in (0, 1):
        result, losses = train(seed)
        found += [x.clone() for x in (result, losses, *net.state_dict().values())]
    return found

def same(tensors, others):
    return len(tensors) == len(others) and all(map(torch.equal, tensors, others))

class OnTheDevice(TorchDispatchMode):
    """Lets nothing pass that is on another device than meta, but for single numbers."""
    def __torch_dispatch__(self, operation, kinds, args=(), kwargs=None):
        outputs = operation(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, outputs)):
            if torch.is_tensor(x) and x.ndim > 0 and not x.is_meta:
                raise RuntimeError(f'{operation} has {list(x.shape)} on another device')
        return outputs

def on_another_device(names, monkeypatch):
    """build and train where a tensor made without device= meets those of the device, and no value can be read."""
    data = sample(names)
    for split in ('train', 'test'):
        data[split] = {key: x.to('meta') for key, x in data[split].items()}

    def capture(function, device, counters):
        def checked():
            with OnTheDevice():
                function()

        return checked

    names['capture'] = capture
    names['progress'] = lambda step, losses: None
    with monkeypatch.context() as patch:
        patch.setattr(torch, 'autocast', lambda *rest, **options: contextlib.nullcontext())  # knows no such device
        patch.setattr(torch.Tensor, 'cpu', lambda x: x)
        train = names['build'](data, torch.device('meta'), None)[0]
        result, losses = train(0)
    assert result.is_meta and losses.is_meta

FEW = {'mnist_fast': ('net.widths=(4,8,8)', 'opt.batch_size=12'),
       'fashion_fast': ('net.widths=(4,4,8)', 'opt.batch_size=24', 'opt.epochs=0.5'),
       'cifar_fast': ('net.widths=(4,4,8)', 'opt.batch_size=60', 'opt.epochs=2', 'opt.full_passes=1')}
LONG = {'mnist_fast': ('aug.shift=2', 'net.crop=24', 'ema.decay=0.99'),
        'fashion_fast': ('aug.shift=1', 'aug.cutout=8', 'net.scale=1.43'),
        'cifar_fast': ('aug.shift=4', 'aug.cutout=12', 'net.depth=3')}
RECIPES = {'short': lambda script: (), 'long': LONG.get, 'one step': lambda script: ('opt.epochs=1e-5',)}
each_script = pytest.mark.parametrize('script', SCRIPTS)

@each_script
@pytest.mark.parametrize('recipe', RECIPES)
@pytest.mark.parametrize('dtype', [None, torch.bfloat16], ids=['float32', 'bfloat16'])
def test_the_rules_of_a_gpu(graphs, monkeypatch, script, recipe, dtype):
    """What graphs read stays alive; two runs by replays equal two plain runs to the last bit; all is on the device."""
    arguments = *FEW[script], *RECIPES[recipe](script)
    assert freed(on_a_gpu(load(script, *arguments)), graphs, dtype) == []
    plain = two_runs(load(script, *arguments), dtype)
    assert same(plain, two_runs(on_a_gpu(load(script, *arguments)), dtype))
    assert len(plain[1]) == 1 if recipe == 'one step' else len(plain[1]) > 2
    assert not torch.equal(plain[1], plain[len(plain) // 2 + 1])  # the second seed's losses
    on_another_device(load(script, *arguments), monkeypatch)

def capture_without_the_function(function, device, counters):
    """A capture() that returns the graph's own method, which does not keep what the graph reads."""
    graph = torch.cuda.CUDAGraph()
    for _ in range(3):
        torch._foreach_zero_(counters)
        function()
    with torch.cuda.graph(graph):
        function()
    return graph.replay

@each_script
def test_the_rules_find_what_breaks_them(graphs, monkeypatch, script):
    names = load(script, *FEW[script])
    names['capture'] = capture_without_the_function
    assert freed(names, graphs)

    def changed(change):
        """The script, whose step does one thing more with its learning rate."""
        names = load(script, *FEW[script])
        update = names['update']
        names['update'] = lambda groups, lr, dtype: update(groups, change(lr).squeeze(), dtype)
        return names

    reads = changed(lambda lr: lr * (1 + 0 * lr.item()))
    with pytest.raises(RuntimeError, match='waits'):
        two_runs(on_a_gpu(reads))
    with pytest.raises(RuntimeError, match='meta'):
        on_another_device(reads, monkeypatch)

    masks = changed(lambda lr: lr[lr > -1])
    with pytest.raises(RuntimeError, match='waits'):
        two_runs(on_a_gpu(masks))

    for change in (lambda lr: lr * torch.ones(1), lambda lr: lr[None][torch.zeros(1, dtype=torch.int64)]):
        with pytest.raises(RuntimeError, match='device'):
            on_another_device(changed(change), monkeypatch)
    assert freed(on_a_gpu(changed(lambda lr: lr * torch.tensor([1.0]))), graphs)  # from the host

    numbers = itertools.count(1)
    counts = changed(lambda lr: lr / next(numbers))
    plain = two_runs(counts)
    numbers = itertools.count(1)
    assert not same(plain, two_runs(on_a_gpu(counts)))

@each_script
def test_graphs_share_their_memory(graphs, script):
    """One pool and one stream for all; each graph has been replayed once when build returns."""
    names = on_a_gpu(load(script, *FEW[script]))
    names['build'](sample(names), CPU, None)
    assert [graph.replays for graph in graphs] == [1] * len(graphs) and len(graphs) > 1
    [(pool, stream)] = {graph.place for graph in graphs}
    assert pool is not None and isinstance(stream, Stream)
    for graph, other in itertools.permutations(graphs, 2):
        assert not set(graph.tape.read) & other.tape.made  # which lies where the pool is used again

def test_capture(graphs):
    """The counters are 0 before each call: three to warm up, one to be captured, one replay."""
    counter, seen = torch.ones(1), []

    def function():
        seen.append(counter.clone())
        counter.add_(1)

    names = on_a_gpu(load('mnist_fast'))
    replay = names['capture'](function, CPU, [counter])
    assert [x.item() for x in seen] == [0, 0, 0, 0] and graphs[0].replays == 1
    assert counter.item() == 1
    replay()
    assert counter.item() == 2 and seen[-1].item() == 1
    assert load('mnist_fast')['capture'](function, CPU, [counter]) is function

def count_waits(monkeypatch):
    """A list that grows with each value that is read from a tensor, which waits for a GPU."""
    item, waits = torch.Tensor.item, []

    def counted(x):
        waits.append(x)
        return item(x)

    monkeypatch.setattr(torch.Tensor, 'item', counted)
    return waits

@pytest.mark.parametrize('steps', [1, 2, 19, 20, 21, 1000])
def test_progress_waits_once(monkeypatch, capsys, steps):
    waits = count_waits(monkeypatch)
    names, losses = load('mnist_fast', 'opt.epochs=4'), torch.ones(steps)
    for step in range(1, steps + 1):
        names['progress'](step, losses)
    assert len(waits) == 1 and capsys.readouterr().out == ''

def test_progress_of_a_slow_run(monkeypatch, capsys):
    """A line an epoch, with its mean loss, and no more waits than these lines need."""
    names, losses = load('mnist_fast', 'opt.epochs=4'), torch.arange(1.0, 101)
    now, waits = itertools.count(), count_waits(monkeypatch)
    monkeypatch.setitem(names, 'time', types.SimpleNamespace(perf_counter=lambda: next(now)))
    for step in range(1, 101):
        names['progress'](step, losses)
    found = re.findall(r'^epoch +(\d) loss ([\d.]+) \d+ s$', capsys.readouterr().out, re.M)
    assert [(int(epoch), float(loss)) for epoch, loss in found] == [(1, 13), (2, 38), (3, 63), (4, 88)]
    assert len(waits) <= 5

class Dtypes(TorchDispatchMode):
    """Notes the dtypes of the operations that losses and their ranking are made of."""
    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, operation, kinds, args=(), kwargs=None):
        outputs = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        if name in ('_log_softmax', 'nll_loss_forward', '_softmax', 'topk', 'convolution'):
            self.found.add((name, tree_leaves(outputs)[0].dtype))
        return outputs

def dtypes_on_cuda(names, monkeypatch):
    """What the captured functions compute in on CUDA, whose autocast has its own rules: with tensors that have a device
    and a dtype, and no values."""
    fake = pytest.importorskip('torch._subclasses.fake_tensor')
    functions, dtypes, cuda = [], Dtypes(), torch.device('cuda')
    shape = names['hyp']['data']['shape']

    def capture(function, device, counters):
        functions.append(function)
        return function

    def backward(loss):
        for parameter in net.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None

    names['capture'] = capture
    with monkeypatch.context() as patch, fake.FakeTensorMode(allow_non_fake_inputs=True), cuda:
        patch.setattr(torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False)
        patch.setattr(torch.cuda, 'is_bf16_supported', lambda *rest, **options: True)
        patch.setattr(torch.nn.Module, 'to', lambda module, *rest, **options: module)  # it is made there
        patch.setattr(torch.Tensor, 'backward', backward)  # there is no such thread for this device
        split = {'images': torch.empty(2000, *shape, dtype=torch.uint8), 'labels': torch.empty(2000, dtype=torch.int64)}
        data = {'train': split, 'test': split, 'classes': [*'0123456789']}
        _, net, _ = names['build'](data, cuda, torch.bfloat16)
        with dtypes:
            for function in functions:
                function()
    return dtypes.found

@each_script
@pytest.mark.skipif(torch.version.cuda is None, reason='this build of torch knows no CUDA')
def test_losses_on_cuda(monkeypatch, script):
    """In float32, whatever the convolutions compute in: half precision has too few digits to rank images by."""
    found = dtypes_on_cuda(load(script), monkeypatch)
    losses = {name: dtype for name, dtype in found if name != 'convolution'}
    assert ('convolution', torch.bfloat16) in found and len(losses) == len(found) - 1
    assert set(losses.values()) == {torch.float32} and {'_log_softmax', 'topk'} <= set(losses)

    text = (HERE / f'{script}.py').read_text(encoding='utf-8').replace('logits.float()', 'logits')
    changed = {'__name__': script}
    exec(text, changed)
    assert ('_log_softmax', torch.bfloat16) in dtypes_on_cuda(changed, monkeypatch)

BATCHES = {'mnist_fast': lambda names, images, index: names['augment'](images, index),
           'fashion_fast': lambda names, images, index: names['augment'](images, index),
           'cifar_fast': lambda names, images, index: names['augment'](images, index, index > 9, (24, 24))}

@each_script
@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('long', [False, True])
def test_memory_formats(script, channels, long):
    """mps gets contiguous batches and filters, as its gradients of others are wrong; the others get channels_last."""
    names = load(script, f'data.shape=({channels},32,32)', *(LONG[script] if long else ()))
    memory_format = names['memory_format']
    assert memory_format(torch.device('mps')) == torch.contiguous_format
    assert {memory_format(torch.device(kind)) for kind in ('cpu', 'cuda')} == {torch.channels_last}

    names['memory_format'] = lambda device: memory_format(torch.device('mps'))
    images = torch.randint(256, (40, channels, 32, 32)).byte()
    batch = BATCHES[script](names, images, torch.arange(20))
    assert batch.is_contiguous()
    _, net, preview = names['build'](sample(names), CPU, None)
    assert all(x.stride() == torch.empty(x.shape).stride() for x in net.parameters())

    names['memory_format'] = memory_format
    if script != 'mnist_fast' and channels == 3:
        assert BATCHES[script](names, images, torch.arange(20)).is_contiguous(memory_format=torch.channels_last)
    _, net, _ = names['build'](sample(names), CPU, None)
    filters = [x for x in net.parameters() if x.ndim == 4]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in filters)

@each_script
def test_patches_without_unfold(monkeypatch, script):
    """The moments of the images' patches are F.unfold's to the last bit; that has a launch an image on CUDA."""
    eigh, moments = torch.linalg.eigh, []

    def watched(x):
        moments.append(x)
        return eigh(x)

    monkeypatch.setattr(torch.linalg, 'eigh', watched)
    names = load(script)
    net, images = names['Net'](10), sample(names)['train']['images']
    names['init_whitening'](net, images)
    size, stride = (4, 2) if script == 'mnist_fast' else (2, 1)
    seen = names['crop'](images) if script == 'mnist_fast' else images
    patches = F.unfold((seen - net.mean) / net.std, size, stride=stride).transpose(0, 1).flatten(1)
    assert torch.equal(moments[0], patches @ patches.T / patches.shape[1])
    assert 'F.unfold' not in (HERE / f'{script}.py').read_text(encoding='utf-8')

# Your own images.

def read(folder, *arguments, name='pets', script='mnist_fast'):
    """The data that a script has of folder/NAME."""
    names = load(script, f'data.name={name}', f'data.dir={folder}', *arguments)
    return names['load_data'](CPU)

def refused_line(folder, *arguments, name='pets', script='mnist_fast', status=1):
    """As read, of what does not fit -> its line. Nothing is written."""
    before = {path: path.stat().st_size for path in folder.rglob('*')}
    names = load(script, f'data.name={name}', f'data.dir={folder}', *arguments)
    line, found = refusal(names, 'load_data', CPU)
    assert found == status and 20 < len(line) < 700, line
    assert before == {path: path.stat().st_size for path in folder.rglob('*')}
    return line

def equal_data(data, other):
    return data['classes'] == other['classes'] and all(
        torch.equal(data[split][key], other[split][key]) for split in ('train', 'test') for key in ('images', 'labels'))

def to_picture(pixels):
    """uint8 [C, H, W] -> a picture in grey or in colour."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy() if len(pixels) == 3 else pixels[0].numpy())

def to_pixels(picture):
    """A picture in grey or in colour -> uint8 [C, H, W]."""
    pixels = torch.from_numpy(numpy.array(picture))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)

def fill(folder, counts, size=(28, 28), suffix='png', seed=0):
    """Writes folder/CLASS/0.png and so on, of random fields in grey, so many of each class."""
    random = torch.Generator().manual_seed(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            fields = torch.randint(256, (1, 7, 7), generator=random).byte()
            to_picture(fields).resize(size, Image.Resampling.NEAREST).save(folder / name / f'{number}.{suffix}')

SIDE = 32

def forms():
    """What cameras, scanners and editors save -> {file name: (picture, options of its file, as a person sees it, mean
    error that is allowed)}."""
    index = numpy.arange(SIDE)[:, None] // 8 * 4 + numpy.arange(SIDE) // 8  # 16 fields
    palette = numpy.random.default_rng(0).integers(256, size=(16, 3), dtype='uint8')
    colour = Image.fromarray(palette[index])
    grey = colour.convert('L')
    indexed = Image.frombytes('P', (SIDE, SIDE), index.astype('uint8').tobytes())
    indexed.putpalette(palette.flatten().tolist())
    alpha = Image.fromarray(numpy.where(index % 3 == 0, 0, numpy.where(index % 3 == 1, 128, 255)).astype('uint8'))
    bits = grey.point(lambda value: 255 * (value > 100)).convert('1')
    deep = numpy.asarray(grey).astype('int32') * 257 + numpy.where(index % 2, 100, -100)  # rounded to the same
    deep = deep.clip(0, 65_535).astype('uint16')
    see_through = {kind: Image.merge(kind + 'A', (*picture.split(), alpha))
                   for kind, picture in {'L': grey, 'RGB': colour}.items()}

    def on_white(picture, mask):
        return Image.composite(picture, Image.new(picture.mode, picture.size, 'white'), mask)

    first = Image.fromarray((255 * (index != 0)).astype('uint8'))  # all but the first field
    return {
        'grey.png': (grey, {}, grey, 0),
        'colour.png': (colour, {}, colour, 0),
        'palette.png': (indexed, {}, colour, 0),
        'palette with a hole.png': (indexed, {'transparency': 0}, on_white(colour, first), 0),
        'colour with a hole.png': (colour, {'transparency': tuple(palette[0].tolist())}, on_white(colour, first), 0),
        'bits.png': (bits, {}, bits.convert('L'), 0),
        'grey with alpha.png': (see_through['L'], {}, on_white(grey, alpha), 1),
        'colour with alpha.png': (see_through['RGB'], {}, on_white(colour, alpha), 1),
        'deep.png': (Image.fromarray(deep), {}, grey, 0),
        'deep.tiff': (Image.fromarray(deep.astype('>u2')), {}, grey, 0),
        'colour.tiff': (colour, {}, colour, 0),
        'colour.bmp': (colour, {}, colour, 0),
        'colour.webp': (colour, {'lossless': True}, colour, 0),
        'colour.gif': (indexed, {}, colour, 0),
        'grey.jpg': (grey, {'quality': 100}, grey, 4),
        'colour.jpg': (colour, {'quality': 100, 'subsampling': 0}, colour, 4),
        'print.jpg': (colour.convert('CMYK'), {'quality': 100}, colour, 6),
    }

@pytest.mark.parametrize('mode, shape', [('L', (1, SIDE, SIDE)), ('RGB', (3, SIDE, SIDE))])
def test_forms_of_pictures(tmp_path, capsys, mode, shape):
    """A class for each form. What systems and programs leave in folders is passed over."""
    pets = tmp_path / 'pets'
    for split, (name, (picture, options, *_)) in itertools.product(('train', 'test'), forms().items()):
        (pets / split / name).mkdir(parents=True)
        picture.save(pets / split / name / f'one {name}', **options)
        for litter in ('.DS_Store', f'._{name}', 'Thumbs.db', '.ipynb_checkpoints/one.png'):
            (pets / split / name / litter).parent.mkdir(exist_ok=True)
            (pets / split / name / litter).write_bytes(b'no picture')
    for litter in ('.DS_Store', 'Thumbs.db', 'train/.DS_Store', 'train/.ipynb_checkpoints/a.png', 'test/.Trash/a.png',
                   'train/notes.txt'):
        (pets / litter).parent.mkdir(exist_ok=True)
        (pets / litter).write_bytes(b'no picture')

    data = read(tmp_path, f'data.shape={shape}')
    said = capsys.readouterr().out
    assert data['classes'] == sorted(forms())
    for split in ('train', 'test'):
        images, labels = data[split].values()
        assert images.dtype == torch.uint8 and images.shape == (len(forms()), *shape)
        assert labels.sort().values.tolist() == [*range(len(forms()))] and labels.dtype == torch.int64
        for image, label in zip(images, labels):
            name = data['classes'][label]
            seen, limit = forms()[name][2:]
            wanted = to_pixels(seen.convert(mode)).int()
            error = (image.int() - wanted).abs()
            assert error.max() <= 3 * limit and error.float().mean() <= limit, name
    assert said.count('\n') == 1 and said.count(f' {len(forms())} ') == 3 and f'{pets}.pt' in said

    # Without the folder, from the file.
    shutil.rmtree(pets)
    assert equal_data(data, read(tmp_path, f'data.shape={shape}')) and capsys.readouterr().out == ''
    assert [path.name for path in tmp_path.iterdir()] == ['pets.pt']

def test_sideways_pictures(tmp_path):
    """All eight values of the tag that phones write, in files without and with loss."""
    upright = (1, 28, 40)
    pixels = F.interpolate(torch.randint(256, (1, 1, 7, 10)).float(), upright[1:])[0].byte()
    turn = Image.Transpose
    stored = {1: None, 2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
              6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270}
    for (tag, way), (suffix, limit) in itertools.product(stored.items(), {'png': 0, 'jpg': 3, 'webp': 9}.items()):
        picture, exif = to_picture(pixels), Image.Exif()
        picture = picture if way is None else picture.transpose(way)
        exif[0x0112] = tag
        path = tmp_path / f'{tag}.{suffix}'
        picture.save(path, exif=exif, quality=100)
        found = load()['read_picture'](path, upright)
        assert (found.int() - pixels).abs().float().mean() <= limit, path.name

def test_pictures_of_other_sizes(tmp_path):
    """Of the middle part, in proportion, and with antialiasing."""
    stripes = Image.new('RGB', (96, 32), 'red')
    stripes.paste('blue', (32, 0, 64, 32))
    stripes.save(tmp_path / 'wide.png')
    stripes.rotate(90, expand=True).save(tmp_path / 'high.png')
    for name in ('wide', 'high'):
        image = load()['read_picture'](tmp_path / f'{name}.png', (3, 32, 32))
        assert torch.equal(image, torch.tensor([0, 0, 255]).byte().view(3, 1, 1).expand(3, 32, 32))
    whole = load()['read_picture'](tmp_path / 'wide.png', (3, 16, 48))
    assert whole[0, 8, 4] == whole[0, 8, 44] == whole[2, 8, 24] == 255

    board = 255 * ((torch.arange(112)[:, None] + torch.arange(112)) % 2)
    to_picture(board.byte()[None]).save(tmp_path / 'board.png')
    image = load()['read_picture'](tmp_path / 'board.png', (1, 28, 28))
    assert image.min() > 120 and image.max() < 136

def test_unreadable_pictures(tmp_path):
    """One line that names the file, and no data file is left."""
    pets = tmp_path / 'pets'
    fill(pets / 'train', {'cat': 3, 'dog': 3})
    fill(pets / 'test', {'cat': 2, 'dog': 2})
    whole = (pets / 'train/cat/0.png').read_bytes()
    Image.open(pets / 'train/cat/0.png').save(tmp_path / 'whole.jpg')
    photo = (tmp_path / 'whole.jpg').read_bytes()
    faults = {'cut.png': whole[:len(whole) // 2], 'cut.jpg': photo[:len(photo) // 2], 'empty.jpg': b'',
              'page.jpg': b'<!DOCTYPE html><html><body>404</body></html>', 'words.txt': b'cats\n'}
    for split, (name, content) in itertools.product(('train', 'test'), faults.items()):
        path = pets / split / 'dog' / name
        path.write_bytes(content)
        assert str(path) in refused_line(tmp_path)
        path.unlink()
    assert len(read(tmp_path)['train']['labels']) == 6

def test_classes_that_differ(tmp_path, capsys):
    pets = tmp_path / 'pets'
    fill(pets / 'train', {'cat': 2, 'dog': 2, 'eel': 2})

    def tried(*classes):
        shutil.rmtree(pets / 'test', ignore_errors=True)
        fill(pets / 'test', dict.fromkeys(classes, 1))
        return refused_line(tmp_path)

    line = tried('cat', 'dog', 'eel', 'fox')
    assert "'fox'" in line and "'cat'" not in line and 'pets' in line
    line = tried('Cat', 'dog', 'eel')
    assert "'cat'" in line and "'Cat'" in line and "'dog'" not in line
    line = tried('cat', 'dog')
    assert "'eel'" in line and "'dog'" not in line

    (pets / 'test/eel').mkdir()  # with a hidden file at most
    (pets / 'test/eel/.DS_Store').write_bytes(b'x')
    assert str(pets / 'test/eel') in refused_line(tmp_path)

    # One class, and pictures that are in no folder of a class.
    fill(tmp_path / 'one/train', {'cat': 5})
    fill(tmp_path / 'none', {'train': 5})
    capsys.readouterr()
    for name in ('one', 'none'):
        line = refused_line(tmp_path, name=name)
        assert str(tmp_path / name) in line and 'class' in line and 'Tensor' not in line, line
    assert 'kept' not in capsys.readouterr().out

def test_a_folder_without_a_test(tmp_path, capsys):
    """A fifth of each class is drawn, always the same; it says so."""
    for name in ('pets', 'again'):
        fill(tmp_path / name / 'train', {'cat': 20, 'dog': 11})
    data = read(tmp_path)
    said = capsys.readouterr().out
    assert said.count('\n') == 1 and 'fifth' in said and ' 24 ' in said and ' 7 ' in said and 'pets.pt' in said
    assert data['test']['labels'].bincount().tolist() == [4, 3]
    assert data['train']['labels'].bincount().tolist() == [16, 8]
    images = torch.cat((data['train']['images'], data['test']['images']))
    assert len(images.unique(dim=0)) == 31
    assert equal_data(data, read(tmp_path, name='again'))

    labels = data['train']['labels']
    assert not torch.equal(labels, labels.sort().values)  # drawn, not by class
    fill(tmp_path / 'lone/train', {'cat': 5, 'dog': 1})
    line = refused_line(tmp_path, name='lone')
    assert 'dog' in line and 'dog: no picture' not in line  # there is one

def test_reading_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    """Every ten seconds, of a clock that is three seconds on at each look."""
    fill(tmp_path / 'pets/train', {'cat': 10, 'dog': 10})
    fill(tmp_path / 'pets/test', {'cat': 2, 'dog': 2})
    names, now = load('mnist_fast', 'data.name=pets', f'data.dir={tmp_path}'), itertools.count(step=3)
    monkeypatch.setitem(names, 'time', types.SimpleNamespace(perf_counter=lambda: next(now)))
    names['load_data'](CPU)
    *said, last = capsys.readouterr().out.splitlines()
    places = [int(re.search(r'train: (\d+) of 20\b', line)[1]) for line in said if 'train:' in line]
    assert 3 <= len(places) <= 6 and places == sorted(places) and 'kept' in last

def test_a_folder_for_data_is_made(tmp_path):
    place = tmp_path / 'new/data'
    line = refused_line(place)
    assert place.is_dir() and f'{place}/pets' in line and 'train' in line

def real_or_generated(set_name, shape):
    """The first images of a set -> the whole of it, where the data folder has it, else generated ones."""
    path = REAL_DATA / f'{set_name}.pt'
    if path.exists():
        return torch.load(path, weights_only=True, mmap=True)
    return generated(shape)

def test_cifar_as_pictures(tmp_path):
    """Written as PNG files, CIFAR-10's images come back to the last bit, with their classes."""
    data = real_or_generated('CIFAR10', (3, 32, 32))
    sizes = {'train': 300, 'test': 100}
    for split, size in sizes.items():
        for number in range(size):
            folder = tmp_path / 'pets' / split / data['classes'][data[split]['labels'][number]]
            folder.mkdir(parents=True, exist_ok=True)
            to_picture(data[split]['images'][number]).save(folder / f'{number}.png')

    found = read(tmp_path, script='cifar_fast')
    assert found['classes'] == sorted(data['classes'])

    def rows(data, split, size):
        images, labels = data[split]['images'][:size], data[split]['labels'][:size]
        return sorted((data['classes'][label], image.numpy().tobytes()) for image, label in zip(images, labels))

    for split, size in sizes.items():
        assert len(found[split]['labels']) == size and rows(found, split, size) == rows(data, split, size)

def test_mnist_as_npz(tmp_path):
    """In Keras' form: labels of uint8 and images without channels."""
    data = real_or_generated('MNIST', (1, 28, 28))
    arrays = {}
    for split in ('train', 'test'):
        arrays |= {f'x_{split}': data[split]['images'][:, 0].numpy(),
                   f'y_{split}': data[split]['labels'].byte().numpy()}
    numpy.savez(tmp_path / 'keras.npz', **arrays)
    found = read(tmp_path, name='keras')
    assert found['classes'] == [*'0123456789']
    assert equal_data(found | {'classes': data['classes']}, data)
    (tmp_path / 'keras.npz').unlink()
    assert equal_data(read(tmp_path, name='keras'), found)

class MakesAFolder:
    """A pickle that runs code as it is loaded."""
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)

def medmnist(n=12, shape=(28, 28), **changes):
    """Arrays as MedMNIST names them: three classes, labels [N, 1]."""
    random, arrays = numpy.random.default_rng(0), {}
    for split in ('train', 'val', 'test'):
        arrays[f'{split}_images'] = random.integers(256, size=(n, *shape), dtype='uint8')
        arrays[f'{split}_labels'] = (numpy.arange(n) % 3).astype('uint8')[:, None]
    return arrays | changes

def test_npz(tmp_path):
    arrays = medmnist(shape=(28, 28, 3), val_images=numpy.zeros(3), val_labels=numpy.zeros(5))
    numpy.savez_compressed(tmp_path / 'colour.npz', **arrays)
    data = read(tmp_path, 'data.shape=(3,28,28)', name='colour')
    assert data['classes'] == ['0', '1', '2']
    for split in ('train', 'test'):
        assert torch.equal(data[split]['images'].permute(0, 2, 3, 1), torch.from_numpy(arrays[f'{split}_images']))
        assert data[split]['labels'].tolist() == arrays[f'{split}_labels'][:, 0].tolist()
        assert data[split]['images'].is_contiguous() and data[split]['labels'].dtype == torch.int64

    for kind in ('<U8', 'S8'):
        words = numpy.array(['dog', 'cat', 'dog', 'eel'] * 3, dtype=kind)
        numpy.savez(tmp_path / f'{words.dtype.kind}.npz', **medmnist(train_labels=words, test_labels=words[:, None]))
        data = read(tmp_path, name=words.dtype.kind)
        assert data['classes'] == ['cat', 'dog', 'eel']
        assert data['train']['labels'].tolist() == data['test']['labels'].tolist() == [1, 0, 1, 2] * 3

def test_faulty_npz(tmp_path):
    """One line each, which names the file and what is wrong."""
    words = numpy.array(['cat', 'dog', 'eel'] * 4)
    harm = numpy.array([MakesAFolder(tmp_path / 'harmed')] * 12, dtype=object)
    from_1 = numpy.arange(12) % 3 + 1
    faults = {  # and what the line says of each
        'from1': (medmnist(train_labels=from_1, test_labels=from_1), 'from 1|1 to 3|from 0'),
        'onehot': (medmnist(train_labels=numpy.eye(3, dtype='int64').repeat(4, 0)), r'12, 3'),
        'floats': (medmnist(train_images=numpy.zeros((12, 28, 28), 'float32')), 'float32'),
        'halves': (medmnist(train_labels=numpy.full(12, 1.5)), 'float'),
        'short': (medmnist(test_labels=numpy.zeros(5, 'uint8')), r'\b5\b'),
        'small': (medmnist(shape=(27, 28)), '27'),
        'other': (medmnist(train_labels=words, test_labels=numpy.array(['cat', 'dog', 'fox'] * 4)), 'fox'),
        'first': (medmnist(shape=(3, 28, 28)), r'3, 28, 28.*wanted.*height|3, 28, 28.*wanted.*H, W'),
        'flat': (medmnist(shape=(784,)), r'784.*wanted.*height|784.*wanted.*H, W'),
        'object': (medmnist(train_images=harm), '[Oo]bject|code|pickle'),
        'lacks': ({key: x for key, x in medmnist().items() if key != 'test_labels'}, 'test_labels'),
        'foreign': ({'a': numpy.zeros(3), 'b': numpy.zeros(3)}, 'x_train|train_images'),
    }
    wrong = []
    for name, (arrays, said) in faults.items():
        numpy.savez(tmp_path / f'{name}.npz', **arrays)
        line = refused_line(tmp_path, name=name)
        _, named, fault = line.partition(f'{name}.npz')
        if not named or not re.search(said, fault):
            wrong.append(line)
    assert not wrong
    (tmp_path / 'cut.npz').write_bytes((tmp_path / 'small.npz').read_bytes()[:-200])
    (tmp_path / 'text.npz').write_bytes(b'no data here\n')
    assert 'cut.npz' in refused_line(tmp_path, name='cut') and 'text.npz' in refused_line(tmp_path, name='text')
    assert not (tmp_path / 'harmed').exists()
    with numpy.load(tmp_path / 'object.npz', allow_pickle=True) as file:
        assert file['train_images'].dtype == object
    assert (tmp_path / 'harmed').exists()  # so it was harmful

def test_faulty_pt(tmp_path):
    """One line each: the file, what was found in it, and what is wanted. The file is left as it is."""
    labels = torch.arange(60) % 3
    images = torch.randint(256, (60, 1, 28, 28), generator=torch.Generator().manual_seed(0)).byte()
    good = {'train': {'images': images, 'labels': labels}, 'test': {'images': images, 'labels': labels},
            'classes': ['ant', 'bee', 'cat']}

    def both(**values):
        return good | {split: good[split] | values for split in ('train', 'test')}

    keys = "'train'.*'images'.*'labels'.*'test'.*'classes'"
    faults = {  # and what was found and what is wanted, as the line says
        'from 1': (both(labels=labels + 1), '1 to 3', '0 to 2'),
        'below 0': (both(labels=labels - 1), '-1 to 1', '0 to 2'),
        'one-hot': (both(labels=F.one_hot(labels)), '60, 3', r'labels \[N\].*argmax'),
        'a column': (both(labels=labels[:, None]), '60, 1', r'labels \[N\]'),
        'int32': (both(labels=labels.int()), 'int32', 'torch.int64'),
        'few labels': (both(labels=labels[:50]), r'labels .*\[50\]', 'each image'),
        'a number': (both(labels=torch.tensor(3)), 'labels', 'each image|labels'),
        'floats': (both(images=images / 255), r'float32 .*0\.0 to 1\.0', r'torch.uint8.* 0 to 255'),
        'no channel': (both(images=images[:, 0]), '60, 28, 28', r'\[N, C, H, W\]'),
        'channels last': (both(images=images.permute(0, 2, 3, 1)), '60, 28, 28, 1', r'\[N, C, H, W\].*permute'),
        'large': (both(images=F.pad(images, (2, 2, 2, 2))), '60, 1, 32, 32', r'\(1, 28, 28\).*data.shape'),
        'lists': (both(images=images.tolist()), 'images .*list', 'tensor'),
        'labels in a list': (both(labels=labels.tolist()), 'labels .*list', 'tensor'),
        'numpy': (both(images=images.numpy()), 'numpy.*torch.from_numpy', ''),
        'no test': ({key: good[key] for key in ('train', 'classes')}, "'test'", keys),
        'no classes': ({key: good[key] for key in ('train', 'test')}, "'classes'", keys),
        'no labels': (good | {'test': {'images': images}}, 'labels .*None', 'tensor'),
        'no images': (both(images=images[:0], labels=labels[:0]), 'images', 'each image'),
        'one class': (both(labels=labels * 0) | {'classes': ['ant']}, '0 to 0', '2 classes'),
        'alike': (both(images=images[:1].expand(60, -1, -1, -1).clone()), '60, 1, 28, 28', 'same'),
        'classes are None': (good | {'classes': None}, "'classes'", 'classes'),
        'classes are numbers': (good | {'classes': [1, 2, 3]}, "'classes'", 'classes'),
        'a tensor': (images, "'test'|'train'", keys),
        'a list': ([images, labels], "'test'|'train'", keys),
    }
    wrong = []
    for name, (content, found, wanted) in faults.items():
        path = tmp_path / f'{name}.pt'
        torch.save(content, path)
        line = refused_line(tmp_path, name=name)
        _, named, fault = line.partition(str(path))
        has, _, wants = fault.partition('wanted')
        if not named or not re.search(found, has) or not re.search(wanted, wants) or 'weights_only' in fault:
            wrong.append(line)
    assert not wrong
    torch.save(good, tmp_path / 'good.pt')
    assert equal_data(read(tmp_path, name='good'), good)

def test_names_of_no_set(tmp_path):
    """The nearest that can be downloaded, and all of them."""
    for name, nearest in {'mnist': 'MNIST', 'EMNIST': 'MNIST', 'cifar-10': 'CIFAR10', 'fashion_mnist': 'FashionMNIST',
                          'SVHN': None, 'ImageNet': None}.items():
        line = refused_line(tmp_path, name=name)
        assert name in line and all(known in line for known in load()['SETS'])
        assert nearest is None or re.search(rf'\b{nearest}\b(?!,)', line), line
        assert 'Synthetic' in line or 'train' in line

@each_script
def test_hint_for_few_images(capsys, script):
    """Few images make few steps: it names opt.epochs, with which it is silent, as it is for the script's own set."""
    names, own = load(script), 50_000 if script == 'cifar_fast' else 60_000
    assert sum(steps for _, steps in names['plan'](own)) == names['STEPS']
    names['hint'](own)
    assert capsys.readouterr().out == ''
    for n in (30, 100, 600, 5000):
        names = load(script)
        names['hint'](n)
        said = capsys.readouterr().out
        values = re.findall(r'\bopt\.\w+=[\d.]*\d', said)
        [epochs] = re.findall(r'\bopt\.epochs=([\d.]*\d)', said)
        assert said.count('\n') == 1 and str(n) in said and float(epochs) > names['hyp']['opt']['epochs']
        load(script, *values)['hint'](n)
        assert capsys.readouterr().out == '', said

def test_hint_is_before_the_table(tmp_path, monkeypatch, capsys):
    fill(tmp_path / 'pets/train', {'cat': 60, 'dog': 40})
    fill(tmp_path / 'pets/test', {'cat': 20, 'dog': 20})
    arguments = 'data.name=pets', f'data.dir={tmp_path}', 'run.runs=1'
    out = main(monkeypatch, capsys, 'mnist_fast', *arguments)
    hints = [place for place, line in enumerate(out.splitlines()) if 'opt.epochs=' in line and '100' in line]
    table = [place for place, line in enumerate(out.splitlines()) if 'acc_plain' in line]
    assert len(hints) == len(table) == 1 and hints < table
    assert summary(out)['runs'] == 1

SHAPES = [('mnist_fast', (1, 40, 28)), ('mnist_fast', (1, 28, 40)), ('fashion_fast', (1, 40, 28)),
          ('fashion_fast', (1, 28, 40)), ('fashion_fast', (3, 28, 40)), ('cifar_fast', (3, 40, 28)),
          ('cifar_fast', (3, 28, 40)), ('cifar_fast', (1, 40, 28))]

@pytest.mark.parametrize('script, shape', SHAPES)
@pytest.mark.parametrize('long', [False, True])
def test_images_that_are_not_square(script, shape, long):
    """They are learnt from and tested whole."""
    extra = LONG[script] if long else ()
    names = load(script, *FEW[script], f'data.shape={shape}', *extra, 'opt.epochs=2')
    data = sample(names)
    train, net, preview = names['build'](data, CPU, None)
    classify, seen = names['Net'].classify, []

    def watched(net, features):
        seen.append(features.shape[2:])
        return classify(net, features)

    names['Net'].classify = watched
    result, losses = train(0)
    assert losses.isfinite().all() and result.isfinite().all() and 0 <= result[0] <= 1
    assert preview().shape == (16, *shape)
    full = net.features(data['test']['images'][:2]).shape[2:]
    assert seen[-1] == full
    smaller = {'cifar_fast': 1}.get(script, 0)  # of it, the first steps' images are scaled down
    assert len(set(seen)) == 1 + smaller

    # Each edge of an image has a part in what the network says.
    images = data['test']['images'].float().requires_grad_()
    net.eval()
    net.features(images).square().sum().backward()
    gradient = images.grad.abs().sum((0, 1))
    assert gradient.shape == shape[1:]
    for edge in (gradient[:2], gradient[-2:], gradient[:, :2], gradient[:, -2:]):
        assert edge.max() > 0

def test_a_run_of_images_that_are_not_square(tmp_path, monkeypatch, capsys):
    """From the table to the picture."""
    path = tmp_path / 'a.png'
    out = main(monkeypatch, capsys, 'mnist_fast', 'data.name=Synthetic', 'data.shape=(1,28,40)', 'run.runs=1',
               f'run.picture={path}')
    assert summary(out)['acc'] > 0.5 and Image.open(path).size[0] > 900

@each_script
@pytest.mark.parametrize('n', [2, 30])
def test_fewer_images_than_a_batch(script, n):
    names = load(script, FEW[script][0], 'opt.epochs=3')
    result, losses = names['build'](sample(names, n), CPU, None)[0](0)
    assert result.isfinite().all() and losses.isfinite().all() and len(losses) >= 1

SMALLEST = {'mnist_fast': (1, 8, 8), 'fashion_fast': (1, 16, 16), 'cifar_fast': (3, 16, 16)}

@each_script
def test_sizes_that_a_network_cannot_take(script):
    channels, height, width = SMALLEST[script]
    for shape in ((channels, height - 1, 40), (channels, 40, width - 1), (0, 32, 32), (channels, 1, 1)):
        line, status = refusal(load(script), 'override', [f'data.shape={shape}'])
        assert status == 2 and str((1, height, width)) in line, line
    crop = (f'net.crop={height}',) if script == 'mnist_fast' else ()
    for shape in ((channels, height, width), (channels, height, 2 * width)):
        names = load(script, *FEW[script], f'data.shape={shape}', *crop, 'opt.epochs=1')
        result, losses = names['build'](sample(names), CPU, None)[0](0)
        assert result.isfinite().all() and losses.isfinite().all()

def test_holdout_is_drawn(tmp_path):
    """By a fixed seed, from a set that is sorted by class; the test set is left alone."""
    labels = torch.arange(1000) // 334
    numbers = torch.stack((torch.arange(1000) // 250, torch.arange(1000) % 250), 1).byte()  # each image its own
    images = F.pad(numbers[:, :, None, None].expand(-1, -1, 28, 14).reshape(1000, 1, 56, 14), (14, 0))[:, :, 14:42]
    data = {'train': {'images': images.contiguous(), 'labels': labels},
            'test': {'images': 255 - images[:50], 'labels': labels[:50]}, 'classes': ['ant', 'bee', 'cat']}
    torch.save(data, tmp_path / 'sorted.pt')
    found = read(tmp_path, 'run.holdout=200', name='sorted')
    again = read(tmp_path, 'run.holdout=200', 'run.seed=5', name='sorted', script='fashion_fast')
    assert equal_data(found, again)
    assert (len(found['train']['labels']), len(found['test']['labels'])) == (800, 200)
    assert found['test']['labels'].bincount(minlength=3).min() > 40

    def rows(split):
        return [(image.numpy().tobytes(), label.item()) for image, label in zip(split['images'], split['labels'])]

    held, kept = rows(found['test']), rows(found['train'])
    assert not set(held) & set(kept) and sorted(held + kept) == sorted(rows(data['train']))
    assert equal_data(read(tmp_path, name='sorted'), data)
    for holdout in (1000, 5000):
        line = refused_line(tmp_path, f'run.holdout={holdout}', name='sorted', status=2)
        assert f'run.holdout={holdout}' in line and '1000' in line

def noisy_set(folder, classes, counts, shape, contrast, draw):
    """Pictures of classes that a network tells from each other, though not always: patterns deep in noise."""
    random = torch.Generator().manual_seed(0)
    patterns = torch.rand(len(classes), shape[0], 4, 4, generator=random)
    for split, count in counts.items():
        for name, pattern in zip(classes, patterns):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = F.interpolate(pattern[None], shape[1:])[0]
                pixels = 100 + contrast * pixels + 90 * torch.rand(shape, generator=random) - 45
                draw(pixels.clamp(0, 255).byte(), folder / split / name, number)

def classify(folder, monkeypatch, capsys):
    """What README's snippet says of the pictures in folder/photos -> {file name: the likeliest class, its share}."""
    text = snippets()['saved network']
    assert len(text.splitlines()) <= 22 and 'torchvision' not in text
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(text, {'__name__': '__main__'})
    found = {}
    for line in capsys.readouterr().out.splitlines():
        name, answer, share = re.match(r'photos.(\S+)\s+(\S.*?)\s+([\d.]+)\s?%', line).groups()
        found[name] = answer, float(share)
    return found

def check_snippet(folder, monkeypatch, capsys, script, classes, *arguments):
    """Trains on folder/pets and saves; the snippet's answers for the test folder's files, and their accuracy."""
    main(monkeypatch, capsys, script, 'data.name=pets', f'data.dir={folder}', f'run.save={folder}/pets.pt2',
         f'run.log={folder}/log.jsonl', 'run.runs=1', 'run.dtype=float32', *arguments)
    _, (line,) = read_log(folder / 'log.jsonl')
    extra = {'about.json': ''}
    torch.export.load(folder / 'pets.pt2', extra_files=extra)
    about = json.loads(extra['about.json'])
    shape = load(script, *arguments)['hyp']['data']['shape']
    assert about['classes'] == sorted(classes) and tuple(about['shape']) == shape

    (folder / 'photos').mkdir()
    (folder / 'photos/.DS_Store').write_bytes(b'no picture')
    truth = {}
    for path in (folder / 'pets/test').glob('*/*'):
        name = f'{len(truth)}{path.suffix}'
        shutil.copy(path, folder / 'photos' / name)
        truth[name] = path.parent.name
    found = classify(folder, monkeypatch, capsys)
    assert set(found) == set(truth)
    right = sum(found[name][0] == truth[name] for name in truth)
    assert right / len(truth) == pytest.approx(line['acc_plain'], abs=1e-6)
    assert 1.5 / len(classes) < line['acc_plain'] < 1  # so that each answer counts
    assert all(100 / len(classes) - 0.1 < share <= 100 for _, share in found.values())

def test_saved_names(tmp_path, monkeypatch, capsys):
    """Folders 0 to 11, whose order is 0, 1, 10, 11, 2 and so on."""
    classes = [str(number) for number in range(12)]

    def draw(pixels, folder, number):
        to_picture(pixels).save(folder / f'{number}.png')

    noisy_set(tmp_path / 'pets', classes, {'train': 40, 'test': 10}, (1, 28, 28), 25, draw)
    check_snippet(tmp_path, monkeypatch, capsys, 'mnist_fast', classes, 'opt.epochs=10', 'opt.batch_size=20')

def test_saved_network_sees_as_training_did(tmp_path, monkeypatch, capsys):
    """Pictures in several forms and sizes, prepared without the script."""
    def draw(pixels, folder, number):
        picture, exif = to_picture(pixels), Image.Exif()
        exif[0x0112] = 6
        if number % 4 == 0:
            picture.transpose(Image.Transpose.ROTATE_90).save(folder / f'{number}.jpg', exif=exif)
        elif number % 4 == 1:
            picture.putalpha(Image.linear_gradient('L').resize(picture.size))
            picture.save(folder / f'{number}.png')
        elif number % 4 == 2:
            Image.fromarray(numpy.asarray(picture.convert('L')).astype('uint16') * 257).save(folder / f'{number}.png')
        else:
            wide = Image.new('RGB', (100, 48), 'green')
            wide.paste(picture, (20, 0))
            wide.save(folder / f'{number}.tiff')

    classes = ['ant', 'bee hive', 'Käfer']
    noisy_set(tmp_path / 'pets', classes, {'train': 40, 'test': 20}, (3, 48, 60), 70, draw)
    values = 'net.widths=(4,4,8)', 'opt.batch_size=20', 'opt.epochs=4', 'data.shape=(3,32,40)'
    check_snippet(tmp_path, monkeypatch, capsys, 'cifar_fast', classes, *values)

@pytest.mark.parametrize('scale, side', [(1.0, 28), (1.43, 40), (2.0, 56)])
def test_enlarged_images(scale, side):
    """With net.scale, the first filters see and whiten the pixels of a bicubic interpolation; without, the images."""
    images = generated((1, 28, 28))['train']['images'][:500]
    names = load('fashion_fast', f'net.scale={scale}')
    net = names['Net'](10)
    names['init_weights'](net)
    names['init_whitening'](net, images)
    seen = []
    net.whiten.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs))
    assert net.features(images).shape == (500, 64, side // 4 - 1, side // 4 - 1)
    pixels = F.interpolate((images - net.mean) / net.std, scale_factor=scale, mode='bicubic')
    assert pixels.shape[2:] == (side, side) and torch.allclose(seen[0], pixels, atol=1e-5)
    assert (F.conv2d(pixels, net.whiten.weight).std((0, 2, 3)) - 1).abs().max() < 0.1

@pytest.mark.parametrize('script', ['fashion_fast', 'cifar_fast'])
def test_grey_pictures_in_colour(script):
    """Between equal channels nothing varies. Still each first filter gives numbers of deviation 1."""
    names = load(script, 'data.shape=(3,32,32)')
    net = names['Net'](10)
    names['init_weights'](net)
    grey = generated((1, 32, 32))['train']['images'][:500].expand(-1, 3, -1, -1)
    names['init_whitening'](net, grey)
    x = F.conv2d((grey - net.mean) / net.std, net.whiten.weight).detach()
    assert (x.std((0, 2, 3)) - 1).abs().max() < 0.1
