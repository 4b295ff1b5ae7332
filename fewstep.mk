# Few steps, end to end: `make fewstep` trains the teachers and their students, measures all, and writes docs/fewstep.md.
# Hours on two cores; it goes on where it was stopped. `make -j2 fewstep` runs two commands at a time.
FS := runs/fewstep
FS_SEEDS := 1 2 3
FS_MODEL := model/model_index.json
FS_PYTHON := OMP_NUM_THREADS=1 $(BIN)/python
FS_FIT = $(FS_PYTHON) train.py fit --config configs/digits.yaml
# The last model counts, not the best.
FS_STEPS = --run.folder $(@:/$(FS_MODEL)=) --run.seed $* --run.steps $(1) --run.validate_every $(1)
FS_STUDENT = --config configs/fewstep/$(1).yaml --network.path $(FS)/digits/$*/$(2)
FS_PAIRS = $(FS_PYTHON) sample.py pairs --prompts configs/fewstep/digits-captions.txt --seed $* --num 10000 --out $(@D)
FS_EVALUATE = $(FS_PYTHON) evaluate.py --out $(@D) --model

.SECONDARY:

# Digits: everything with three seeds. A training step of 32 pictures counts as 96 evaluations.
$(FS)/digits/%/teacher/$(FS_MODEL): | $(READY)
	$(FS_FIT) $(call FS_STEPS,5000)

$(FS)/digits/%/ddim/$(FS_MODEL): | $(READY)
	$(FS_FIT) --config configs/objective/eps-linear.yaml $(call FS_STEPS,5000)

$(FS)/digits/%/pairs/report.json: $(FS)/digits/%/teacher/$(FS_MODEL)
	$(FS_PAIRS) --model $(FS)/digits/$*/teacher --sampler heun --steps 4

$(FS)/digits/%/2-rectified/$(FS_MODEL): $(FS)/digits/%/pairs/report.json
	$(FS_FIT) $(call FS_STUDENT,reflow,teacher) $(call FS_STEPS,3300) \
		--data.store $(<D) --data.teacher $(FS)/digits/$*/teacher

$(FS)/digits/%/straight-pairs/report.json: $(FS)/digits/%/2-rectified/$(FS_MODEL)
	$(FS_PAIRS) --model $(FS)/digits/$*/2-rectified --steps 2 --seed 10$*

$(FS)/digits/%/distilled/$(FS_MODEL): $(FS)/digits/%/straight-pairs/report.json
	$(FS_FIT) $(call FS_STUDENT,distill,2-rectified) $(call FS_STEPS,700) \
		--data.store $(<D) --data.teacher $(FS)/digits/$*/2-rectified

$(FS)/digits/%/meanflow/$(FS_MODEL): | $(READY)
	$(FS_FIT) --config configs/fewstep/meanflow.yaml $(call FS_STEPS,4200)

$(FS)/digits/%/guided/$(FS_MODEL): $(FS)/digits/%/teacher/$(FS_MODEL)
	$(FS_FIT) $(call FS_STUDENT,guidance,teacher) $(call FS_STEPS,3000) \
		--teacher.model $(FS)/digits/$*/teacher

FS_MEASURED := teacher ddim 2-rectified distilled meanflow
$(FS)/digits/%/measured/results.json: $(foreach m,$(FS_MEASURED),$(FS)/digits/%/$(m)/$(FS_MODEL))
	$(FS_EVALUATE) $(FS)/digits/$*/teacher $(foreach m,$(wordlist 2,9,$(FS_MEASURED)),--model $(FS)/digits/$*/$(m)) \
		--steps 1,2,4,8

$(FS)/digits/%/straightness/results.json: $(foreach m,teacher 2-rectified,$(FS)/digits/%/$(m)/$(FS_MODEL))
	$(FS_EVALUATE) $(FS)/digits/$*/teacher --model $(FS)/digits/$*/2-rectified --steps 50

$(FS)/digits/%/guidance/results.json: $(foreach m,teacher guided,$(FS)/digits/%/$(m)/$(FS_MODEL))
	$(FS_EVALUATE) $(FS)/digits/$*/teacher --model $(FS)/digits/$*/guided --guidance 3 --steps 8

$(FS)/digits/%/grid.json: $(FS)/digits/%/teacher/$(FS_MODEL)
	$(FS_PYTHON) sample.py grid --model $(FS)/digits/$*/teacher --prompts configs/fewstep/digits-captions.txt \
		--steps 2 4 8 --out $@

# Shapes: the teacher is that of `make shapes`. Its training took 30,000 steps of 96 evaluations.
FS_SHAPES := $(FS)/shapes
FS_SHAPES_PAIRS = $(FS_PYTHON) sample.py pairs --prompts stores/shapes --batch-size 32 --out $(@D)
FS_SHAPES_FIT = $(FS_PYTHON) train.py fit --config configs/shapes.yaml --config configs/fewstep/$(1).yaml \
	--run.folder $(@:/$(FS_MODEL)=) --run.steps $(3) --run.validate_every $(3) --data.store $(<D) --data.teacher $(2) --network.path $(2)

$(FS_SHAPES)/teacher.done: | $(READY)
	$(FS_PYTHON) encode.py --config configs/shapes.yaml
	$(FS_PYTHON) train.py fit --config configs/shapes.yaml
	mkdir -p $(@D) && touch $@

$(FS_SHAPES)/pairs/report.json: $(FS_SHAPES)/teacher.done
	$(FS_SHAPES_PAIRS) --model runs/shapes --num 16384 --steps 20

$(FS_SHAPES)/2-rectified/$(FS_MODEL): $(FS_SHAPES)/pairs/report.json
	$(call FS_SHAPES_FIT,reflow,runs/shapes,8000)

$(FS_SHAPES)/straight-pairs/report.json: $(FS_SHAPES)/2-rectified/$(FS_MODEL)
	$(FS_SHAPES_PAIRS) --model $(FS_SHAPES)/2-rectified --num 49152 --seed 1 --steps 6

$(FS_SHAPES)/distilled/$(FS_MODEL): $(FS_SHAPES)/straight-pairs/report.json
	$(call FS_SHAPES_FIT,distill,$(FS_SHAPES)/2-rectified,4000)

FS_SHAPES_STUDENTS := $(foreach m,2-rectified distilled,$(FS_SHAPES)/$(m))
$(FS_SHAPES)/measured/results.json: $(FS_SHAPES_STUDENTS:=/$(FS_MODEL))
	$(FS_EVALUATE) runs/shapes $(FS_SHAPES_STUDENTS:%=--model %) --data shapes --steps 1,2,4,8,20

$(FS_SHAPES)/judged-20/results.json: $(FS_SHAPES)/teacher.done
	$(FS_PYTHON) judge.py --model runs/shapes --steps 20 --per-category 100 --out $(@D)

$(FS_SHAPES)/judged-%/results.json: $(FS_SHAPES_STUDENTS:=/$(FS_MODEL))
	$(FS_PYTHON) judge.py $(FS_SHAPES_STUDENTS:%=--model %) --steps $* --per-category 100 --out $(@D)

fewstep: $(foreach s,$(FS_SEEDS),$(foreach r,measured straightness guidance,$(FS)/digits/$(s)/$(r)/results.json)) \
		$(FS)/digits/$(firstword $(FS_SEEDS))/grid.json \
		$(foreach r,measured judged-20 judged-1 judged-2,$(FS_SHAPES)/$(r)/results.json)
	$(BIN)/python -m tools.fewstep
