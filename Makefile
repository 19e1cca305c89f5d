# make demo   the whole path on one machine (README: how long it takes)
# make test   the test suite
PYTHON ?= python3
PY := .venv/bin/python
REQUIREMENTS := -r requirements.txt -r requirements-dev.txt
DEMO := output/demo
DATA := $(DEMO)/data
TEACHER := data/demo_teacher.pth
CONFIGS := configs/demo
REPORT_CONFIGS := --retrieval_config $(CONFIGS)/retrieval_flickr.yaml --caption_config $(CONFIGS)/caption_flickr.yaml
# On a CPU two processes of one thread are faster than one process of two. The demo is made for it: a GPU is left alone.
TORCHRUN := OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --nproc_per_node=2
CPU := --device cpu
# The same student without a teacher: from scratch, without distillation terms.
PLAIN := teacher.weights=null

.PHONY: setup demo demo-compare demo-teacher test lint clean

setup: .venv/installed

# uv installs the same files faster where it is present; it is never required.
.venv/installed: requirements.txt requirements-dev.txt requirements-scale.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	if command -v uv >/dev/null; then uv pip install --python $(PY) $(REQUIREMENTS); \
	else $(PY) -m pip install $(REQUIREMENTS); fi
	touch $@

# The README's path on rendered scenes. A step that was finished is not repeated; `make clean` starts over. The test
# images are left to eval.report, which measures student and teacher once.
demo: setup
	$(PY) -m data.scene_layouts --out $(DATA) --pretrain 9000 --flickr_train 800 --prompted 0.1
	$(PY) json_dataset.py --root $(DATA) --out $(DATA)/dataloader
	$(TORCHRUN) pretrain_dlip.py $(CPU) --config $(CONFIGS)/pretrain.yaml --output_dir $(DEMO)/pretrain
	$(TORCHRUN) train_dlip_retrieval_flickr.py $(CPU) --config $(CONFIGS)/retrieval_flickr.yaml --output_dir $(DEMO)/retrieval \
	  --no_test
	$(TORCHRUN) train_dlip_caption_flickr.py $(CPU) --config $(CONFIGS)/caption_flickr.yaml --output_dir $(DEMO)/caption --no_test
	$(PY) -m eval.report --teacher $(TEACHER) --retrieval $(DEMO)/retrieval/best.pth --caption $(DEMO)/caption/best.pth \
	  $(REPORT_CONFIGS) --curves $(DEMO)/pretrain/curves.png --output_dir $(DEMO)
	$(PY) -m prod.try_it --retrieval $(DEMO)/retrieval/best.pth --caption $(DEMO)/caption/best.pth \
	  $(DATA)/flickr30k/flickr30k-images/test000000.jpg $(DATA)/flickr30k/flickr30k-images/test000001.jpg
	$(PY) -m prod.caption $(DATA)/sbu/00001 --weight $(DEMO)/caption/best.pth --out $(DEMO)/captions.jsonl
	$(PY) -m prod.search $(DATA)/flickr30k/flickr30k-images "a small red star left of a large blue heart on black" \
	  $(DATA)/flickr30k/flickr30k-images/test000007.jpg --weight $(DEMO)/retrieval/best.pth --index $(DEMO)/index \
	  --rerank 20 --sheet $(DEMO)/hits.png

# The same student trained without its teacher for the same steps, as a third net of the table.
demo-compare: demo
	$(TORCHRUN) pretrain_dlip.py $(CPU) --config $(CONFIGS)/pretrain.yaml --output_dir $(DEMO)/plain/pretrain $(PLAIN) \
	  model.init_vision=null model.init_text=null
	$(TORCHRUN) train_dlip_retrieval_flickr.py $(CPU) --config $(CONFIGS)/retrieval_flickr.yaml --output_dir $(DEMO)/plain/retrieval \
	  --no_test $(PLAIN) model.init=$(DEMO)/plain/pretrain/last.pth
	$(TORCHRUN) train_dlip_caption_flickr.py $(CPU) --config $(CONFIGS)/caption_flickr.yaml --output_dir $(DEMO)/plain/caption \
	  --no_test $(PLAIN) model.init=$(DEMO)/plain/pretrain/last.pth
	$(PY) -m eval.report --teacher $(TEACHER) --retrieval $(DEMO)/retrieval/best.pth --caption $(DEMO)/caption/best.pth \
	  --plain_retrieval $(DEMO)/plain/retrieval/best.pth --plain_caption $(DEMO)/plain/caption/best.pth \
	  $(REPORT_CONFIGS) --curves $(DEMO)/pretrain/curves.png $(DEMO)/plain/pretrain/curves.png \
	  --output_dir $(DEMO)/compare

# How data/demo_teacher.pth was made: first scenes of one kind of thing and captions only, then all scenes, then all
# losses; last, new scenes of which some captions begin with the prompt, which it has not met before.
EASY := $(DEMO)/teacher/easy_data
FULL := $(DEMO)/teacher/data
PROMPTED := $(DEMO)/teacher/prompted_data
demo-teacher: setup
	$(PY) -m data.scene_layouts --out $(EASY) --pretrain 12000 --flickr_train 5 --flickr_val 50 --flickr_test 50 \
	  --seed 3 --kinds single=0.6 group=0.4
	$(PY) -m data.scene_layouts --out $(FULL) --pretrain 40000 --seed 1
	$(PY) -m data.scene_layouts --out $(PROMPTED) --pretrain 40000 --flickr_train 5 --flickr_val 50 --flickr_test 50 \
	  --seed 4 --prompted 0.2
	for set in $(EASY) $(FULL) $(PROMPTED); do $(PY) json_dataset.py --root $$set --out $$set/dataloader || exit 1; done
	$(TORCHRUN) pretrain_dlip.py $(CPU) --config $(CONFIGS)/teacher.yaml --output_dir $(DEMO)/teacher/easy \
	  data.train=$(EASY)/dataloader/all.json loss.ita=0 loss.itm=0 train.batch_size=16 train.epochs=5
	$(TORCHRUN) pretrain_dlip.py $(CPU) --config $(CONFIGS)/teacher.yaml --output_dir $(DEMO)/teacher/captions \
	  model.init=$(DEMO)/teacher/easy/last.pth loss.ita=0 loss.itm=0 train.epochs=4
	$(TORCHRUN) pretrain_dlip.py $(CPU) --config $(CONFIGS)/teacher.yaml --output_dir $(DEMO)/teacher/all \
	  model.init=$(DEMO)/teacher/captions/last.pth optim.lr_scheduler=cosine train.epochs=3
	$(TORCHRUN) pretrain_dlip.py $(CPU) --config $(CONFIGS)/teacher.yaml --output_dir $(DEMO)/teacher/prompted \
	  data.train=$(PROMPTED)/dataloader/all.json model.init=$(DEMO)/teacher/all/last.pth optim.lr=2e-4 \
	  optim.lr_scheduler=cosine train.epochs=1
	$(PY) -m prod.export $(DEMO)/teacher/prompted/last.pth $(TEACHER) --half

# Two files at a time, those that take longest first (tests/conftest.py): most of a test's time is one process that
# waits or computes alone.
test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	$(PY) -m ruff check .

clean:
	rm -rf output
