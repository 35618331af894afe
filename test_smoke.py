"""Tests of the scripts as a user meets them: python -m pytest. Real sets are used where DATA_DIR has them."""
import ast
import contextlib
import functools
import gc
import io
import itertools
import json
import linecache
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import types
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

HERE = Path(__file__).resolve().parent
REAL_DATA = Path(os.environ.get('DATA_DIR', 'data')).resolve()
SHAPES = {'mnist_fast': (1, 28, 28), 'fashion_fast': (1, 28, 28), 'cifar_fast': (3, 32, 32)}
LONG = {'mnist_fast': ['aug.shift=2'], 'fashion_fast': ['aug.shift=1', 'aug.cutout=8', 'net.scale=1.43'],
        'cifar_fast': ['aug.shift=4', 'aug.cutout=12', 'net.deep=True']}
CPU = torch.device('cpu')
TINY = ('data.name=Mine', 'run.device=cpu', 'run.dtype=float32', 'run.runs=1', 'opt.batch_size=30', 'opt.epochs=0.3',
        'net.widths=(8,16,16)')  # six steps
LEARNS = *TINY, 'opt.epochs=1.8', 'run.runs=2', 'run.seed=7'  # in a second
torch.set_num_threads(1)  # with more, small networks crawl where another program has a core

@pytest.fixture(scope='module', params=SHAPES)
def script(request):
    return request.param

@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('DATA_DIR', 'data')

def make_set(shape=(1, 28, 28), train=600, test=200, classes=3):
    """The content of data/Mine.pt, which is written: classes that a network soon tells from each other."""
    random = torch.Generator().manual_seed(1)
    patterns = F.interpolate(torch.rand(classes, shape[0], 7, 7, generator=random), shape[1:])
    data = {'classes': [f'class {number}' for number in range(classes)]}
    for split, size in (('train', train), ('test', test)):
        labels = torch.arange(size) % classes
        images = 20 + 50 * patterns[labels] + 180 * torch.rand(size, *shape, generator=random)
        data[split] = {'images': images.byte(), 'labels': labels}
    Path('data').mkdir(exist_ok=True)
    torch.save(data, 'data/Mine.pt')
    return data

def read(path):
    return Path(path).read_text(encoding='utf-8')

compiled = functools.cache(lambda script: compile(read(HERE / f'{script}.py'), str(HERE / f'{script}.py'), 'exec'))

def load(script='mnist_fast', *arguments):
    """A script's names, with a hyp of their own; nothing has run."""
    names = {'__name__': script, '__file__': str(HERE / f'{script}.py'), 'get_ipython': None}  # as %run has it
    exec(compiled(script), names)
    names['override'](arguments)
    return names

def run(script, *arguments, **changes):
    """What `python script.py arguments` does, in this process -> output, net, data, runs. changes: to its names."""
    names = load(script)
    names.update(changes)
    out = io.StringIO()
    with mock.patch.object(sys, 'argv', [f'{script}.py', *arguments]), contextlib.redirect_stdout(out):
        net, data, runs = names['main']()
    return types.SimpleNamespace(out=out.getvalue(), net=net, data=data, runs=runs)

def refusal(function, *arguments):
    with pytest.raises(SystemExit, match='^[^\n]+$') as caught:
        function(*arguments)
    return caught.value.code

def read_log(path='log.jsonl'):
    lines = [json.loads(line) for line in read(path).splitlines() if line]
    return [line for line in lines if 'hyp' in line], [line for line in lines if 'acc' in line]

def summary(text):
    """The fields of the summary, which is the last line."""
    fields = dict(re.findall(r'  (\w+)=(\S+)', text.splitlines()[-1]))
    assert [*fields] == ['script', 'runs', 'acc', 'std', 'ci99', 'time_s', 'target', 'met']
    return fields

# A run, its log and its network
@pytest.fixture(scope='module')
def finished(script, tmp_path_factory):
    """Two runs on a small set, logged and saved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp('finished'))
        make_set(SHAPES[script])
        found = run(script, *LEARNS, 'data.dir=data', 'run.log=log.jsonl', 'run.save=net.pt2')
        found.folder = Path.cwd()
    return found

def test_a_run_learns_and_says_so(script, finished, monkeypatch):
    """The first line, a row per run, the summary; the log, with text and values; run.runs=0 summarises that."""
    first = finished.out.splitlines()[0]
    assert all(word in first for word in (script, 'cpu', '1 thread', 'float32', 'Mine.pt')), first
    rows = re.findall(r'^ *(\d+) +(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +(\d+) +([\d.]+)$', finished.out, re.M)
    for number, (row, found) in enumerate(zip(rows, finished.runs, strict=True)):
        expected = [number, 7 + number, found['acc'], found['acc_plain'], found['loss'], 36, found['time_s']]
        assert [float(value) for value in row] == pytest.approx(expected, abs=6e-4)
        assert found['acc'] > 0.85 and found['acc_plain'] > 0.8 and len(found['losses']) == 36
        assert found['losses'][-1] < 0.7 * found['losses'][0]
    fields = summary(finished.out)
    assert (fields['script'], fields['runs']) == (script, '2')
    assert float(fields['acc']) == pytest.approx(statistics.mean(found['acc'] for found in finished.runs), abs=6e-6)
    monkeypatch.chdir(finished.folder)
    (header,), lines = read_log()
    assert header['script'] == script and header['code'] == read(HERE / f'{script}.py')
    assert header['hyp']['net']['widths'] == [8, 16, 16] and header['torch'] == torch.__version__ and header['device']
    assert lines == finished.runs and {line['start'] for line in lines} == {header['start']}
    assert {'seed', 'acc', 'acc_plain', 'loss', 'time_s', 'losses'} <= set(lines[0])
    assert summary(run(script, 'run.runs=0', 'run.log=log.jsonl').out) == fields

def test_the_saved_network(script, finished):
    """It needs no script, has the classes' names, and answers as the network did, which stays as it was."""
    files = {'classes.json': ''}
    net = torch.export.load(finished.folder / 'net.pt2', extra_files=files).module()
    assert json.loads(files['classes.json']) == ['class 0', 'class 1', 'class 2']
    images, labels = make_set(SHAPES[script])['test'].values()
    logits = torch.cat([net(part) for part in images.split(64)])
    assert (logits.argmax(1) == labels).float().mean().item() == finished.runs[-1]['acc_plain']
    assert not finished.net.training and torch.allclose(logits, finished.net(images), atol=1e-4)

def test_a_name_or_a_type_that_does_not_fit():
    names = load()
    override, hyp = names['override'], names['hyp']
    assert 'nearest is aug.shift' in refusal(override, ['aug.shfit=2'])
    for text in ('run.log', 'opt.batch_size=x', 'opt.batch_size=1.5', 'opt.lr=', 'net.widths=3', 'opt.batch_size=True'):
        group, name = text.partition('=')[0].split('.')
        line = refusal(override, [text])
        assert text in line and str(hyp[group][name]) in line
    override(['opt.epochs=2', 'data.name=3', 'net.widths=(1,2,3)', 'run.log=a=b'])
    assert isinstance(hyp['opt']['epochs'], float) and hyp['net']['widths'] == (1, 2, 3)
    assert (hyp['opt']['epochs'], hyp['data']['name'], hyp['run']['log']) == (2.0, '3', 'a=b')

def test_shown_values_are_accepted():
    """All of README.md and the docstrings, by a script that the line names; or else the refusal is shown too."""
    texts = {'': read(HERE / 'README.md')} | {script: load(script)['__doc__'] for script in SHAPES}
    shown = [(line, value.rstrip('.'), script) for script, text in texts.items() for line in text.splitlines()
             for value in re.findall(r'\b(?:data|aug|net|opt|ema|tta|run)\.\w+=(?:\([^)]*\)|[^\s,;:`"\')|$]+)', line)]
    assert len(shown) > 10
    for line, value, script in shown:
        said = []
        for name in [script] if script else re.findall(r'(\w+_fast)\.py', line) or SHAPES:
            try:
                load(name, value)
                said.append('')
            except SystemExit as error:
                said.append(f'\n    {error.code}\n')
        assert any(message in texts[''] for message in said), f'{value} in: {line}'

# Data
def load_mine(*arguments):
    return load('mnist_fast', 'data.name=Mine', *arguments)['load_data'](CPU)

def test_holdout():
    """The same training images each time, which are not trained on; the test set is left alone, and can be missing."""
    whole = make_set()
    first = load_mine('run.holdout=100')
    torch.rand(9)
    assert torch.equal(first['test']['images'], load_mine('run.holdout=100', 'run.seed=5')['test']['images'])
    splits = [first[split] for split in ('train', 'test')]
    assert [len(split['labels']) for split in splits] == [500, 100]
    pairs = {(image.numpy().tobytes(), label.item()) for split in splits for image, label in zip(*split.values())}
    assert pairs == {(image.numpy().tobytes(), label.item()) for image, label in zip(*whole['train'].values())}
    del whole['test']
    torch.save(whole, 'data/Mine.pt')
    assert [len(load_mine()[split]['labels']) for split in ('train', 'test')] == [480, 120]

@pytest.mark.parametrize('split', ['train', 'test'])
@pytest.mark.parametrize('key, value, wanted', [
    ('images', torch.zeros(600, 1, 28, 28), 'uint8'),
    ('images', torch.zeros(600, 784).byte(), r'\(1, 28, 28\)'),
    ('images', torch.zeros(600, 1, 14, 14).byte(), r'\(1, 28, 28\)'),
    ('labels', torch.zeros(600), 'int64'),
    ('labels', torch.zeros(600, 3).long(), r'\[N\]|\[600\]'),
    ('labels', torch.full((600,), 3), '0 to 2'),
    ('labels', torch.full((600,), -1), '0 to 2'),
    ('labels', torch.zeros(599).long(), '600')])
def test_a_faulty_file(split, key, value, wanted):
    """One line that names the file, the split and what is wanted."""
    data = make_set(test=600)
    data[split][key] = value
    torch.save(data, 'data/Mine.pt')
    line = refusal(load_mine)
    assert 'Mine.pt' in line and split in line and re.search(wanted, line), line

@pytest.mark.parametrize('script, name', [('mnist_fast', 'MNIST'), ('fashion_fast', 'FashionMNIST')])
def test_torchvisions_files(script, name, monkeypatch):
    """They become NAME.pt, which is used from then on, without torchvision."""
    assert 'KMNIST' in refusal(load_mine)
    data = make_set(train=90, test=30, classes=10)
    raw = Path('data', name, 'raw')
    raw.mkdir(parents=True)
    for split, part in (('train', 'train'), ('test', 't10k')):
        for key, values in data[split].items():
            array = values.byte().squeeze().numpy()
            header = numpy.array((0x800 + array.ndim, *array.shape), '>u4')
            (raw / f'{part}-{key}-idx{array.ndim}-ubyte').write_bytes(header.tobytes() + array.tobytes())
    found = [load(script)['load_data'](CPU)]
    shutil.rmtree(raw)
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    found.append(load(script)['load_data'](CPU))
    for loaded, split, key in itertools.product(found, ('train', 'test'), ('images', 'labels')):
        assert torch.equal(loaded[split][key], data[split][key]) and loaded[split][key].dtype == data[split][key].dtype
    assert len(loaded['classes']) == 10 and isinstance(loaded['classes'][0], str)
    assert {path.name for path in Path('data').glob('*.*')} == {f'{name}.pt', 'Mine.pt'}

@pytest.mark.parametrize('mirror, own', [('good', ''), ('', 'good'), ('bad', 'good'), ('bad', 'bad'), ('', '')])
def test_cifars_mirror(monkeypatch, mirror, own):
    """The mirror is asked first, then CIFAR's own server; what has another md5 is not taken from either."""
    import torchvision
    asked = []

    class CIFAR10:
        url, filename, tgz_md5 = 'https://own', 'archive', 'good'
        classes, targets = ['cat', 'dog'], [0, 1, 0, 1, 0, 1, 0, 1]
        data = numpy.random.default_rng(0).integers(256, size=(8, 32, 32, 3), dtype='uint8')

        def __init__(self, root, train=True, download=False):
            archive = Path(root, 'archive')
            if download and not archive.exists():
                asked.append(self.url)
                archive.write_text(own if self.url == 'https://own' else mirror)
            if not archive.exists() or archive.read_text() != self.tgz_md5:
                archive.unlink(missing_ok=True)
                raise RuntimeError('corrupted')

    monkeypatch.setattr(torchvision.datasets, 'CIFAR10', CIFAR10)
    with contextlib.nullcontext() if 'good' in (mirror, own) else pytest.raises(RuntimeError, match='corrupted'):
        data = load('cifar_fast')['load_data'](CPU)
        assert torch.equal(data['test']['images'].permute(0, 2, 3, 1), torch.from_numpy(CIFAR10.data))
        assert data['train']['labels'].tolist() == CIFAR10.targets and data['classes'] == ['cat', 'dog']
    assert [*Path('data').iterdir()] == ([Path('data/CIFAR10.pt')] if 'good' in (mirror, own) else [])
    assert asked[0] != 'https://own' and asked[1:] == ([] if mirror == 'good' else ['https://own'])

# Pictures
def fill(folder, classes=('cat', 'dog', 'owl'), count=10, first=0):
    """Writes folder/CLASS/0.png and so on, each in a grey of its own: 80 times the class + first + a number."""
    for label, name in enumerate(classes):
        Path(folder, name).mkdir(parents=True)
        for number in range(count):
            Image.new('RGB', (40, 40), 3 * (80 * label + first + number,)).save(Path(folder, name, f'{number}.png'))

def seen(picture, shape=(1, 28, 28), name='one.png', **options):
    picture.save(name, **options)
    return load('mnist_fast', f'data.shape={shape}')['read_picture'](Path(name)).int()

def test_forms_of_pictures():
    """Upright, on white, 16 bits as 8, in the colours of data.shape, of the middle."""
    fields = numpy.kron(numpy.arange(16).reshape(4, 4) * 17, numpy.ones((7, 7))).astype('uint8')  # 28 x 28, 0 to 255
    grey = torch.from_numpy(fields)[None].int()
    picture = Image.fromarray(fields)
    assert torch.equal(seen(picture, (3, 28, 28)), grey.expand(3, -1, -1))
    for order, name in (('<u2', 'one.png'), ('>u2', 'one.tiff')):
        deep = Image.fromarray((fields * 257.0).astype(order))
        assert deep.mode.startswith('I;16') and (seen(deep, name=name) - grey).abs().max() <= 1
    turned = Image.Exif()
    turned[0x0112] = 6  # a phone that was held upright
    sideways = picture.transpose(Image.Transpose.ROTATE_90)
    assert (seen(sideways, name='one.jpg', exif=turned, quality=95) - grey).abs().max() < 20
    see_through = picture.convert('RGBA')
    see_through.putalpha(Image.fromarray((fields > 100).astype('uint8') * 255))
    assert torch.equal(seen(see_through), torch.where(grey > 100, grey, 255))
    assert torch.equal(seen(picture.convert('P'), transparency=0), torch.where(grey > 0, grey, 255))
    stripes = Image.new('RGB', (96, 32), 'red')
    stripes.paste('blue', (32, 0, 64, 32))
    assert seen(stripes, (3, 16, 16))[:, :, 1:-1].flatten(1).unique(dim=1).tolist() == [[0], [0], [255]]
    assert seen(stripes, (3, 16, 48))[:, 8, 4].tolist() == [255, 0, 0]

@pytest.mark.parametrize('name', ['test', 'val', 'valid', ''])
def test_a_folder(name):
    """What stands for test is used; without any a fifth is held out; what is hidden is passed over."""
    fill('data/Mine/train')
    if name:
        fill(f'data/Mine/{name}', count=4, first=40)
    for path in ('.DS_Store', 'train/.DS_Store', 'train/cat/._0.png', 'train/.hidden/0.png', 'train/cat/.hidden/0.png'):
        Path('data/Mine', path).parent.mkdir(exist_ok=True)
        Path('data/Mine', path).write_bytes(b'no picture')
    data = load_mine()
    assert data['classes'] == ['cat', 'dog', 'owl']
    assert [len(data[split]['labels']) for split in ('train', 'test')] == ([30, 12] if name else [24, 6])
    greys = torch.cat([data[split]['images'][:, 0, 14, 14] for split in ('train', 'test')])
    labels = torch.cat([data[split]['labels'] for split in ('train', 'test')])
    assert torch.equal(greys // 80, labels) and len(greys.unique()) == len(greys)
    shutil.rmtree('data/Mine')
    assert torch.equal(load_mine()['test']['images'], data['test']['images'])

def test_a_folder_that_cannot_be_read():
    """A line with the name of the file, or of the folder with other classes, and no data file."""
    fill('data/Mine/train')
    picture = Image.open('data/Mine/train/cat/0.png')
    for mode, name in (('RGB', 'cut.jpg'), ('RGB', 'cut.png'), ('F', 'F.tiff'), ('I', 'I.tiff')):
        picture.convert(mode).save(name)
    faults = {name: Path(name).read_bytes() for name in ('F.tiff', 'I.tiff')}
    faults |= {name: Path(name).read_bytes()[:-40] for name in ('cut.jpg', 'cut.png')}
    faults |= {'phone.heic': b'\0\0\0\x18ftypheic' + bytes(90), 'empty.jpg': b'', 'notes.txt': b'cats'}
    for name, content in faults.items():
        path = Path('data/Mine/train/dog', name)
        path.write_bytes(content)
        assert str(path) in refusal(load_mine)
        path.unlink()
    fill('data/Mine/test', ('cat', 'dog', 'emu'))
    line = refusal(load_mine)
    assert 'owl' in line and 'emu' in line and str(Path('data/Mine/test')) in line and not [*Path('data').glob('*.p*')]
    shutil.copy('cut.png', 'data/Mine/train/beside.png')  # in no folder of a class
    assert refusal(load_mine).startswith(str(Path('data/Mine/train')))

# Reports
def test_intervals():
    """Student's t from a printed table; Welch's by hand, with df = 0.0101^2 / (0.01^2 / 1 + 0.0001^2 / 3) = 1.02."""
    interval = load()['interval']
    for n, t in ((2, 63.657), (3, 9.925), (5, 4.604), (30, 2.756)):
        assert interval([*range(n)]) == pytest.approx(t * statistics.stdev(range(n)) / n**0.5, rel=4e-4)
    assert 5.6 < interval([0.9, 1.1], [0.5, 0.52, 0.54, 0.52 + 0.0006**0.5]) < 6.4
    assert interval([0.5]) == interval([0.5, 0.5]) == interval([0.5, 0.6], [0.5]) == math.inf

def write_log(start, accs, *values, code='a = 1', path='log.jsonl', seed=0):
    """A header and a line for each accuracy."""
    lines = [{'start': start, 'script': 'mnist_fast', 'hyp': load('mnist_fast', *values)['hyp'], 'code': code}]
    lines += [{'start': start, 'seed': seed + number, 'acc': acc, 'time_s': 1.0} for number, acc in enumerate(accs)]
    with open(path, 'a', encoding='utf-8') as file:
        file.writelines(f'{json.dumps(line)}\n' for line in lines)

def summarise(*arguments):
    return summary(run('mnist_fast', 'run.runs=0', 'run.log=log.jsonl', *arguments).out)

def test_a_logs_summary():
    """The runs of the last recipe, each seed once, whatever their folder and log; torn lines are left out."""
    for value in ('opt.lr=9', 'run.holdout=500', 'run.dtype=bfloat16'):
        write_log(value, (0.5, 0.6), value, seed=5)
    write_log('four', (0.5, 0.6), code='a = 2', seed=5)
    write_log('five', (0.90, 0.91), code='a = 1\n# Nothing below\nb')
    write_log('six', (0.91, 0.95), 'data.dir=x', 'run.seed=1', seed=1, code='a = 1\n# Nothing below\nc')
    assert {('runs', '3'), ('acc', '0.92000'), ('std', '0.02646'), ('ci99', '0.15161')} <= {*summarise().items()}
    for target, met in (('0.7', 'yes'), ('0.99', 'open'), ('1.2', 'no')):
        assert summarise(f'run.target={target}')['met'] == met
    with open('log.jsonl', 'a', encoding='utf-8') as file:
        file.write('{"start": "six", "seed": 3, "acc": 0.')
    assert summarise()['runs'] == '3'
    make_set()
    run('mnist_fast', *TINY, 'run.log=log.jsonl')  # whose header begins a line of its own
    assert summarise()['runs'] == '1'

def test_a_baseline():
    """The diff and the verdict: an error of sqrt(2 * 0.0004 / 3), df = 4, t = 4.604. The log so far can be it."""
    write_log('one', (0.80, 0.82, 0.84), 'opt.lr=0.5', code='a = 2', path='base.jsonl')
    for difference, verdict in ((0.1, 'better'), (-0.1, 'worse'), (0.07, 'open')):
        write_log('two', [acc + difference for acc in (0.80, 0.82, 0.84)], path=f'{verdict}.jsonl')
        out = run('mnist_fast', 'run.runs=0', f'run.log={verdict}.jsonl', 'run.baseline=base.jsonl').out
        assert f'baseline  acc {difference:+.5f} +- 0.07518 (99 %)  {verdict}' in out.splitlines()
        assert re.findall(r'^[-+]\w.*', out, re.M) == ['-a = 2', '+a = 1', '-opt.lr=0.5', '+opt.lr=0.25']
    make_set()
    again = run('mnist_fast', *TINY, 'run.log=worse.jsonl', 'run.baseline=worse.jsonl').out
    assert 'open' in again.splitlines()[-2] and '-a = 1' in again.splitlines() and summary(again)['runs'] == '1'
    with pytest.raises((OSError, SystemExit), match='nowhere'):
        run('mnist_fast', *TINY, 'run.baseline=nowhere.jsonl', build=None)

# What the recipes are made of
def test_augment(script):
    """Against a slow look-up: moved by up to aug.shift pixels, with edges mirrored or wrapped; flipped where wanted."""
    def inside(place, size):
        return place % size if script == 'mnist_fast' else min(abs(place), 2 * size - 2 - abs(place))
    augment = load(script, 'aug.shift=2')['augment']
    images = torch.randint(256, (400, 3, 20, 24)).byte()
    index = torch.randperm(400)
    flip = torch.rand(400) < 0.5
    torch.manual_seed(0)
    batch = augment(images, index, *((flip, (20, 24)) if script == 'cifar_fast' else ()))
    found = {}
    for down, right, way in itertools.product(range(-2, 3), range(-2, 3), (1, -1)):
        rows = [inside(row + down, 20) for row in range(20)]
        columns = [inside(column + right, 24) for column in range(24)][::way]
        found[down, right, way] = (images[index][:, :, rows][..., columns] == batch).flatten(1).all(1)
    assert (sum(found.values()) == 1).all()
    assert all(here.any() == (script != 'mnist_fast' or way == 1) for (*_, way), here in found.items())
    if script == 'cifar_fast':
        assert torch.equal(flip, sum(here for key, here in found.items() if key[2] == -1) == 1)
        torch.manual_seed(0)
        small = augment(images, index, flip, (10, 15))
        assert torch.allclose(small, F.interpolate(batch, (10, 15), mode='bilinear'), atol=1e-3)

@pytest.mark.parametrize('script, blank', [('fashion_fast', 0), ('cifar_fast', 120)])
def test_cutout(script, blank):
    """Each image loses one square, whole, at any place."""
    index = torch.zeros(2000, dtype=torch.int64)
    more = (index > 0, (20, 24)) if script == 'cifar_fast' else ()
    augment = load(script, 'aug.cutout=8', 'aug.shift=0')['augment']
    gone = augment(torch.full((1, 3, 20, 24), 200).byte(), index, *more) == blank
    assert torch.equal(gone.all(1), gone.any(1)) and (gone[:, 0].sum((1, 2)) == 64).all()
    for lines in (gone[:, 0].any(2), gone[:, 0].any(1)):
        first = lines.int().argmax(1)
        assert (lines.sum(1) == 8).all() and lines.gather(1, first[:, None] + torch.arange(8)).all()
        assert first.unique().tolist() == [*range(lines.shape[1] - 7)]

def test_whitening(script):
    """What the first layer makes of patches has about the identity as its covariance; a channel can be black."""
    names = load(script)
    net = names['Net'](10)
    images = (128 + 120 * F.avg_pool2d(torch.randn(300, *SHAPES[script]), 3, 1, 1)).clamp(0, 255).byte()
    names['init'](net, images)
    layer = net.conv1 if script == 'mnist_fast' else net.whiten
    cropped = names['crop'](images) if script == 'mnist_fast' else images
    normal = (cropped.float() - net.mean) / net.std
    assert abs(normal.mean()) < 1e-3 and abs(normal.std() - 1) < 1e-3
    patches = F.unfold(normal, layer.kernel_size, stride=layer.stride).transpose(1, 2).flatten(0, 1)
    half = min(len(layer.weight) // 2, patches.shape[1])
    filters = layer.weight.detach().flatten(1)
    outputs = patches @ filters[:half].T
    assert torch.allclose(outputs.T @ outputs / len(outputs), torch.eye(half), atol=0.15)
    assert torch.equal(filters[:half], -filters[half:2 * half])
    images[:, 0] = 0
    names['init'](net, images)
    assert all(weight.isfinite().all() for weight in net.state_dict().values())

def test_orthogonalize(script):
    """The singular vectors stay, the singular values are near 1."""
    update = torch.randn(24, 5, 3, 3)
    left, values, right = torch.linalg.svd(update.flatten(1), full_matrices=False)
    inner = left.T @ load(script)['orthogonalize'](update, torch.float32).flatten(1) @ right.T
    assert (inner - inner.diag().diag()).abs().max() < 1e-3
    assert inner.diag().min() > 0.5 and inner.diag().max() < 1.5 and values.max() > 2 * values.min()

def test_optimizer(script):
    """Muon by its formula, the rest against torch.optim.SGD; a layer that was added is trained too."""
    names = load(script, 'net.widths=(4,6,8)', 'opt.head_lr=0.1', 'opt.bias_lr=0.2')
    opt = names['hyp']['opt']
    net = names['Net'](3)
    net.more = torch.nn.Linear(5, 5)
    optimizer = names['Optimizer'](net, None)
    twins = {p: torch.nn.Parameter(p.detach().clone()) for p in net.parameters() if p.requires_grad}
    lrs = {p: 0.1 if p is net.head.weight else 0.2 if p.ndim == 1 else opt['lr'] for p in twins}
    groups = [{'params': [twins[p]], 'lr': lr / 2} for p, lr in lrs.items()]
    sgd = torch.optim.SGD(groups, momentum=opt['momentum'], nesterov=True)
    for number in range(3):
        for p, twin in twins.items():
            p.grad = torch.randn_like(p)
            twin.grad = p.grad.clone()
            if lrs[p] == opt['lr']:  # Muon; of the first step alone, as later momenta are sums
                twin.data *= 1 if script == 'mnist_fast' else len(p)**0.5 / p.norm()
                twin.grad = names['orthogonalize'](p.grad, torch.float32) / (1 + opt['momentum'])
        optimizer.step(torch.tensor(0.5))
        sgd.step()
        for p, twin in twins.items():
            assert torch.allclose(p, twin, rtol=1e-4, atol=1e-5) or lrs[p] == opt['lr'] and number > 0

def watch(script, *arguments):
    """Trains -> each batch's indices and, in cifar_fast.py, flips; each loss's values; net; test set; result."""
    names = load(script, *TINY, *arguments)
    augment = names['augment']
    data = make_set(SHAPES[script], test=1000)
    batches = []

    def watched(images, index, *rest):
        batches.append([x.tolist() for x in (index, *rest[:1])])
        return augment(images, index, *rest)
    names['augment'] = watched
    train, net = names['build'](data, CPU, None)
    with mock.patch.object(F, 'cross_entropy', wraps=F.cross_entropy) as spy:
        result, _ = train(0)
    losses = [F.cross_entropy(*call.args, reduction='none').detach() for call in spy.call_args_list[:-1]]
    return batches, losses, net, data['test'], result.tolist()

def test_average(script):
    """After one step, the tested weights are a quarter of the way from the first ones to the last ones."""
    nets = [watch(script, 'opt.epochs=1e-5', f'ema.decay={decay}')[2] for decay in (1.0, 0.75, 0.0)]
    for first, mixed, last in zip(*(net.parameters() for net in nets)):
        assert torch.allclose(mixed, first.lerp(last, 0.25), atol=1e-6)
    assert not torch.equal(last, first)

def test_choice_of_mnist():
    """First those that a linear classifier fits worst; then, of three times as many, the hardest; conv1 stays."""
    data = make_set(train=400)['train']
    data['labels'] = (data['labels'] + (torch.arange(400) < 100)) % 3
    first = load('mnist_fast', 'net.margin=0')['hardest_half'](data['images'], data['labels'], 3)
    assert len(first.unique()) == 200 and (first < 100).sum() > 75
    batches, losses, net, *_ = watch('mnist_fast', 'opt.epochs=2', 'opt.batch_size=20', 'opt.candidates=3')
    assert [len(index) for index, in batches] == [20] * 15 + [60] * 45
    for candidates, chosen in zip(losses[15::2], losses[16::2], strict=True):
        assert torch.allclose(chosen.sort().values, candidates.sort().values[-20:], atol=1e-5)
    assert net.conv1.weight.grad is None and net.conv2.weight.grad is not None

def test_choice_of_fashion():
    """Of 2.5 times as many, those with the highest last losses; so none from the lower third."""
    batches, losses, *_ = watch('fashion_fast', 'opt.epochs=3', 'opt.candidates=2.5')
    last_losses = dict.fromkeys(range(600), math.inf)
    for (index,), loss in zip(batches, losses[::2], strict=True):
        assert min(last_losses[image] for image in index) >= sorted(last_losses.values())[200]
        last_losses |= dict(zip(index, loss.tolist()))
    assert math.inf not in sorted(last_losses.values())[:590] and len(batches) == 60

def test_choice_of_cifar():
    """Two passes see each image once each way; later ones those with the highest last losses."""
    arguments = 'opt.epochs=3', 'opt.full_epochs=2', 'opt.hard_share=0.5', 'opt.bias_lr=1e-3'
    batches, losses, *_ = watch('cifar_fast', *arguments)
    seen = [pair for index, flip in batches for pair in zip(index, flip)]
    assert sorted(seen[:1200]) == [(image, way) for image in range(600) for way in (False, True)]
    assert 200 < sum(way for _, way in seen[:600]) < 400 and len({image for image, _ in seen[:600]}) == 600
    last_losses = {}
    for (index, _), loss in zip(batches[:40], losses[::2]):
        last_losses |= dict(zip(index, loss.tolist()))
    hardest = sorted(last_losses, key=last_losses.get)[300:]
    assert {image for index, _ in batches[40:50] for image in index} == {*hardest}
    assert not any(way for _, flip in watch('cifar_fast', 'aug.flip=False')[0] for way in flip)

@pytest.mark.parametrize('script, flip', [('mnist_fast', None), ('fashion_fast', False), ('fashion_fast', True),
                                          ('cifar_fast', False), ('cifar_fast', True)])
def test_views(script, flip):
    """The half of the images whose first two classes are nearest gets the mean over its views."""
    more = ['opt.epochs=0.3'] if flip is None else ['opt.epochs=1.9', f'aug.flip={flip}']
    *_, net, test, found = watch(script, 'tta.share=0.5', 'aug.shift=2', *more)
    net.eval()
    images, labels = test.values()
    padded = F.pad(images.float(), (1, 1, 1, 1), 'reflect')
    views = [images, padded[:, :, 2:, 2:], padded[:, :, :-2, :-2]]
    if script != 'cifar_fast':
        views = [images.roll(move, (2, 3)) for move in ((0, 0), (-1, 0), (0, -1), (0, 1), (1, 0))]
    if flip:
        views += [view.flip(3) for view in views]
    plain = net(images)
    first, second = plain.softmax(1).topk(2).values.T
    uncertain = (first - second).argsort()[:500]
    answers = plain.argmax(1)
    answers[uncertain] = sum(net(view).softmax(1) for view in views)[uncertain].argmax(1)
    assert (answers != plain.argmax(1)).any()
    expected = [(guess == labels).float().mean().item() for guess in (answers, plain.argmax(1))]
    assert found == pytest.approx([*expected, F.cross_entropy(plain, labels).item()], rel=1e-4)

# A GPU's rules, rehearsed on a CPU
class Graph(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph: notes the operations of a call, and repeats them at the same addresses."""
    made = []

    def __init__(self):
        super().__init__()
        self.calls = []
        self.written = set()  # addresses
        self.read = {}  # by address, of what others made: whether it still lives, and words
        Graph.made.append(self)

    def __torch_dispatch__(self, operation, kinds, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        indices = args[1] if 'index' in name and isinstance(args[1], list | tuple) else ()
        masks = [x for x in indices if x is not None and x.dtype == torch.bool]
        if masks or name in ('_local_scalar_dense', 'nonzero', 'masked_select', 'equal', '_unique2', 'bincount'):
            raise RuntimeError(f'{name} waits for the device')
        for x in filter(torch.is_tensor, tree_leaves((args, kwargs))):
            storage = x.untyped_storage()
            if storage.data_ptr() not in self.written:
                self.read[storage.data_ptr()] = StorageWeakRef(storage), f'{name} reads {list(x.shape)}'
        outputs = operation(*args, **(kwargs or {}))
        written = {x.untyped_storage().data_ptr() for x in tree_leaves(outputs) if torch.is_tensor(x)}
        self.written |= written - set(self.read)
        self.calls.append((operation, args, kwargs or {}, outputs))
        return outputs

    @torch.no_grad()
    def replay(self):
        for operation, args, kwargs, outputs in self.calls:
            for old, new in zip(tree_leaves(outputs), tree_leaves(operation(*args, **kwargs))):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

def rehearsed(script, gpu, change=None, forget=False, device='cpu'):
    """What build makes of a small set. gpu: capture() takes the CPU for one. change: of Muon's updates."""
    names = load(script, *TINY, 'opt.batch_size=20', *LONG[script])
    capture, orthogonalize = names['capture'], names['orthogonalize']

    def capture_on_a_gpu(function, device):
        one = torch.ones(())
        replay = capture(lambda: function() * one, types.SimpleNamespace(type='cuda'))
        return None if forget else replay
    names['capture'] = capture_on_a_gpu if gpu else capture
    names['orthogonalize'] = lambda update, dtype: (change or torch.clone)(orthogonalize(update, dtype))
    data = make_set(SHAPES[script], 120, 40)
    for split in ('train', 'test'):
        data[split] = {key: x.to(device) for key, x in data[split].items()}
    Graph.made.clear()
    return names['build'](data, torch.device(device), None)

def freed(script, **options):
    """Act one: a graph holds addresses, not tensors. What graphs read that is gone once build has returned."""
    kept = rehearsed(script, True, **options)
    for graph in Graph.made:
        graph.calls.clear()
    gc.collect()
    assert Graph.made and kept
    return [words for graph in Graph.made for storage, words in graph.read.values() if storage.expired()]

def two_runs(*arguments):
    """Act two: results, losses and weights of two seeds, which replays must repeat to the last bit."""
    train, net = rehearsed(*arguments)
    return [x.tolist() for seed in (0, 1) for x in (*train(seed), *net.state_dict().values())]

def test_a_gpus_rules(monkeypatch, script):
    """Each act passes, and fails where a function breaks its rule."""
    stand_ins = dict.fromkeys(('Stream', 'stream', 'synchronize'), contextlib.nullcontext) | {'CUDAGraph': Graph}
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, 'graph', lambda graph, **options: graph)
    monkeypatch.setattr(torch, 'autocast', lambda *rest, **options: contextlib.nullcontext())  # meta is unknown to it
    monkeypatch.setattr(torch.Tensor, 'cpu', lambda x: x)
    assert freed(script) == [] and 'mul reads []' in freed(script, forget=True)
    assert two_runs(script, False) == two_runs(script, True)
    counters = itertools.count(1), itertools.count(1)
    plain, replayed = [two_runs(script, gpu, lambda update, counter=counters[gpu]: update / next(counter))
                       for gpu in (False, True)]
    assert plain != replayed
    with pytest.raises(RuntimeError, match='waits'):
        two_runs(script, True, lambda update: update * (1 + 0 * update.sum().item()))
    # Act three: a tensor that was made on the CPU by mistake meets those of another device.
    result, losses = rehearsed(script, False, device='meta')[0](0)
    assert result.is_meta and losses.is_meta
    with pytest.raises(RuntimeError, match='device'):
        rehearsed(script, False, lambda update: update * torch.ones(1), device='meta')[0](0)

# Other ways to run
def test_a_notebook(script, monkeypatch, capsys):
    """The text in a cell, and that edited, then a cell that calls main(); a seed's run repeats to the last bit."""
    images, _ = make_set(SHAPES[script])['test'].values()
    monkeypatch.setattr(sys, 'argv', ['ipykernel_launcher.py', '-f', '/x/kernel.json'])
    names = {'__name__': '__main__'}
    edit = f"\noverride({[*TINY, 'run.runs=2', 'run.log=log.jsonl']})\nif __name__ =="
    cell = read(HERE / f'{script}.py').replace('\nif __name__ ==', edit, 1)
    cells = cell, cell.replace("'run.runs=2'", "'run.seed=1'"), "hyp['opt']['epochs'] = 0.6\nnet, data, runs = main()\n"
    found = []
    for number, text in enumerate(cells):
        file = f'<ipython-input-{number}-0a1b2c>'
        linecache.cache[file] = len(text), None, text.splitlines(True), file  # as IPython does
        exec(compile(text, file, 'exec'), names)
        found += [[run[key] for key in ('seed', 'losses', 'loss', 'acc', 'acc_plain')] for run in names['runs']]
    assert [(seed, len(losses)) for seed, losses, *_ in found] == [(0, 6), (1, 6), (1, 6), (1, 12)]
    assert found[0] != found[1] == found[2] and found[0][1] != found[1][1]
    assert torch.allclose(names['net'](names['data']['test']['images'][:50]), names['net'](images)[:50], atol=1e-4)
    codes = [header['code'] for header in read_log()[0]]
    assert codes == [*cells[:2], cells[1]] and capsys.readouterr().out.count('summary') == 3

def test_ctrl_c():
    """In the third run of six steps each: the summary and the log have the first two, and no network is saved."""
    make_set()
    progress = mock.Mock(side_effect=[None] * 12 + [KeyboardInterrupt])
    found = run('mnist_fast', *TINY, 'run.runs=9', 'run.log=log.jsonl', 'run.save=net.pt2', progress=progress)
    assert summary(found.out)['runs'] == '2' and len(read_log()[1]) == 2 and not Path('net.pt2').read_bytes()

def test_two_processes(monkeypatch):
    """torchrun's processes share the runs: one summary of all, and the log has them. Generated images need no file."""
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    arguments = *TINY, 'data.name=Synthetic', 'opt.epochs=0.05', 'run.runs=3', 'run.log=log.jsonl'
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2']
    done = subprocess.run([*command, HERE / 'mnist_fast.py', *arguments], capture_output=True, text=True)
    assert done.returncode == 0 and not Path('data').exists(), done.stderr
    assert done.stdout.count('acc_plain') == done.stdout.count('summary') == 1 and summary(done.stdout)['runs'] == '3'
    alone = {(found['seed'], found['acc']) for found in run('mnist_fast', *arguments[:-1]).runs}
    assert len(read_log()[1]) == 3 and {(line['seed'], line['acc']) for line in read_log()[1]} == alone

@pytest.mark.parametrize('sizes, steps', [({'shape': (24, 36)}, 12), ({'train': 9}, 5), ({'classes': 99}, 12), ({}, 1)])
def test_other_sizes(script, sizes, steps):
    """Images that are not square, too few for batches of two, many classes, one step."""
    shape = SHAPES[script][:1] + sizes.get('shape', SHAPES[script][1:])
    make_set(**sizes | {'shape': shape})
    found = run(script, *TINY, f'data.shape={shape}', f'opt.epochs={0.6 if sizes else 1e-5}')
    assert len(found.runs[0]['losses']) == steps and math.isfinite(sum(found.runs[0]['losses']))
    assert found.net(found.data['test']['images'][:5]).shape == (5, sizes.get('classes', 3))

@pytest.mark.parametrize('name, whole, recipe', [('mnist_fast.py', 615, 285), ('fashion_fast.py', 635, 305),
                                                 ('cifar_fast.py', 665, 335), ('test_smoke.py', 750, 0)])
def test_style(name, whole, recipe):
    """What a reader can take in: few lines, one statement a line, none for its side effects only; one machinery."""
    text = read(HERE / name)
    assert len(text.splitlines()) <= whole and max(map(len, text.splitlines())) <= 120
    if recipe:
        above, rule, below = re.split(r'\n\n(# -{60,}\n)', text)
        assert len(above.splitlines()) <= recipe and len(below.splitlines()) <= 330
        assert below == read(HERE / 'mnist_fast.py').partition(rule)[2] and below.startswith('# Nothing below depends')
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr):
            assert not isinstance(node.value, ast.Tuple | ast.BoolOp | ast.IfExp), node.lineno
        if isinstance(node, ast.stmt) and hasattr(node, 'body'):
            assert node.body[0].lineno > node.lineno, node.lineno
        if isinstance(node, ast.FunctionDef):
            assert node.name == 'build' or node.end_lineno - node.lineno < 60, node.name

BLOCKS = re.findall(r'(?:<!-- snippet: (.+?) -->\n+)?```python\n(.+?)```', read(HERE / 'README.md'), re.S)
SNIPPETS = {name: text for name, text in BLOCKS if name}

@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """A folder after a small run on pictures: data, a log, the saved network, photos; and what a notebook has then."""
    folder = tmp_path_factory.mktemp('prepared')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fill('data/pets/train', count=40)
        fill('data/pets/test', count=20, first=40)
        shutil.copytree('data/pets/test/cat', 'photos')
        found = run('cifar_fast', *TINY, 'data.name=pets', 'data.dir=data', 'opt.batch_size=10', 'run.runs=2',
                    'run.log=runs.jsonl', 'run.save=pets.pt2')
    return folder, load('cifar_fast') | {'net': found.net, 'data': found.data, 'runs': found.runs}

@pytest.mark.parametrize('name', SNIPPETS)
def test_a_snippet(name, prepared):
    """At most 15 lines, which run after those that they continue, and make the files that they name."""
    folder, notebook = prepared
    shutil.copytree(folder, '.', dirs_exist_ok=True)
    names = {}
    for other, text in [*SNIPPETS.items()][:[*SNIPPETS].index(name) + 1]:
        if 'matplotlib' in text:
            pytest.importorskip('matplotlib').use('Agg')
        if 'torch.export.load' in text:
            names = {}
        if re.search(r'\b(data|runs|hyp)\[', text):
            names = dict(notebook)
        exec(compile(text, other, 'exec'), names)
    assert len(text.splitlines()) <= 15
    for file in re.findall(r"'([\w/]+\.(?:png|csv|pt))'", text):
        assert Path(file).stat().st_size > 50

def test_the_readme():
    """It is short, as records/ are; what it shows of the scripts is there."""
    records = [*(HERE / 'records').rglob('*')]
    assert len({path.parent for path in records}) <= 15 and sum(path.stat().st_size for path in records) < 5e6
    scripts = [read(HERE / f'{script}.py') for script in SHAPES]
    assert len(read(HERE / 'README.md').splitlines()) <= 220
    assert all(any(text in script for script in scripts) for name, text in BLOCKS if not name)

@pytest.mark.parametrize('script, name, bound, arguments', [
    ('mnist_fast', 'MNIST', 0.988, ['run.runs=5']),
    ('fashion_fast', 'FashionMNIST', 0.85, ['run.runs=1', 'opt.epochs=0.5', 'net.widths=(16,32,64)']),
    ('cifar_fast', 'CIFAR10', 0.5, ['run.runs=1', 'opt.epochs=0.5', 'net.widths=(16,32,64)'])])
def test_real_data(script, name, bound, arguments):
    if not (REAL_DATA / f'{name}.pt').exists():
        pytest.skip(f'no {REAL_DATA}/{name}.pt')
    found = run(script, f'data.dir={REAL_DATA}', 'run.device=cpu', 'run.dtype=float32', *arguments)
    assert statistics.mean(result['acc'] for result in found.runs) > bound
