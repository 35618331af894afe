import sys, os, json, torch, torch.nn.functional as F
torch.set_num_threads(1)
path, out, *ov = sys.argv[1:]
names={'__name__':'script'}
exec(compile(open('exp.py').read(),'exp.py','exec'),names)
names['hyp']['run']['holdout']=10000
names['hyp']['data']['dir']='data'
names['override'](ov)
data=names['load_data'](torch.device('cpu'))
net=names['Net'](10).to(memory_format=torch.channels_last)
net.load_state_dict(torch.load(path)); net.eval()
images,labels=data['test']['images'],data['test']['labels']
@torch.no_grad()
def predict(x):
    with torch.autocast('cpu',torch.bfloat16,cache_enabled=False):
        return torch.cat([net(p) for p in x.float().split(1000)]).float()
P={}
pad=F.pad(images.float(),(2,2,2,2),'reflect')
def shift(d,r): return pad[:,:,2+d:34+d,2+r:34+r]
for d in (-2,-1,0,1,2):
    for r in (-2,-1,0,1,2):
        if abs(d)==2 or abs(r)==2:
            if not ((d,r) in ((2,0),(-2,0),(0,2),(0,-2))): continue
        for f in (0,1):
            x=shift(d,r); x=x.flip(3) if f else x
            P[d,r,f]=predict(x)
for s in (28,36):
    for f in (0,1):
        x=F.interpolate(images.float(),(s,s),mode='bilinear'); x=x.flip(3) if f else x
        P[s,f]=predict(x)
torch.save({'P':P,'labels':labels},out)
