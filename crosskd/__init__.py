"""
CrossKD training of compact detectors; torch and mmdet live here.

Commands: train, adopt, distill, choose, export, predict, pipeline, shapes, check_data. Then the rooms, each of which
imports only those that follow it:

- workers: commands that `benchmarks` starts, not people: the time of a detection in torch, and of a training step;
  the export of a detector that is not trained.
- choice: a student by what it takes on the target: which there are, their measurement, the search.
- int8: the rounding of a student's INT8 graph while it trains, and the two INT8 files of such a training.
- loop: what stands beside the steps: runner, hooks, skipped batches, precision, processes, the check of the teacher.
- models: the detector of student and teacher, methods of distillation, families of heads, losses, backbones, weights.

What commands and workers share of int8, loop and models stands above these three: training, stages (of the pipeline),
run_dir, recipes (those of configs/recipes), and config, which registers what a config may name. Ground, below all:
data, schedule, written_config, transforms, download, corrections, disk_space; settings.
"""
