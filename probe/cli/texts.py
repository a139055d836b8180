"""What the help says."""

from __future__ import annotations

USAGE = {
    "run": "[--config NAME_OR_FILE] [--checkpoint FOLDER] [--section.key VALUE ...]",
    "demo": "[--section.key VALUE ...]",
    "attribute": "[--config NAME_OR_FILE] [--checkpoint FOLDER] [--section.key VALUE ...]",
    "whatif": "[--config NAME_OR_FILE] [--exact NAMES] [--target_deltaH NATS] [--section.key VALUE ...]",
    "sweep": "[--config NAME_OR_FILE] [--checkpoint FOLDER] [--LIST VALUES ...] [--section.key VALUE ...]",
    "plan": "[--config NAME_OR_FILE] [--checkpoint FOLDER] [--pilot_B_E N] [--section.key VALUE ...]",
    "report": "LOG [--output FILE]",
    "compare": "A B [--unpaired] [--output.results_path FILE.json]",
}
"""What the help of a subcommand begins with."""
SUMMARIES = {
    "run": "Probe a checkpoint: load it, draw E and U, predict, measure, report.",
    "demo": "Probe the built-in demo policy (made when absent) and say what to try next.",
    "attribute": "Say which tokens of the update did it: exact contributions, coupling, the predictors' league table.",
    "whatif": "Say what other updates would do (clip, reweigh, drop tokens, another rate), and solve for a target.",
    "sweep": "Probe a grid of learning rates, batch sizes, seeds and checkpoints; can be stopped and continued.",
    "plan": "From one small pilot: how large E and U must be to resolve the update, and what that would cost.",
    "report": "Make one HTML page of what a run or a training has left: a log, a trainer's state, TensorBoard events.",
    "compare": "Say what one run has more than another on the same E, with errors that know what they share.",
}
"""What the help says of each subcommand."""
DESCRIPTION = """Predict and measure what the next update does to a policy's entropy.

examples:
  entropy-probe demo
  entropy-probe run --config quickstart
  entropy-probe run --config my.yaml --checkpoint /path/to/checkpoint-60
  entropy-probe attribute --config quickstart
  entropy-probe whatif --config quickstart --target_deltaH -0.001
  entropy-probe sweep --config quickstart --eta_factors "[0.5, 1, 2]"
  entropy-probe plan --config quickstart
  entropy-probe report lightning_logs/2025-01-15/entropy_probe_14-30-25_step_60.json.gz
  entropy-probe compare A.json.gz B.json.gz

--config takes a YAML file, or the name of a configuration that comes with the package:
  {configs}"""
DESCRIPTIONS = {
    "run": """Probe a checkpoint: predict what the next update does to the policy's entropy, and measure it.

examples:
  entropy-probe run --config quickstart
  entropy-probe run --config qwen2_5_1_5b_gsm8k --checkpoint /path/to/checkpoint-60
  entropy-probe run --checkpoint /path/to/checkpoint-60 --batch_config.dataset_name prompts.jsonl \\
      --batch_config.split train --batch_config.reward my_rewards:accuracy

--config takes a YAML file, or the name of a configuration that comes with the package:
  {configs}
--checkpoint takes the folder of a checkpoint, as transformers' Trainer and TRL write it (an adapter or a full model,
with optimizer.pt); it is short for --checkpoint.checkpoint_path. Loss, sampling and sizes that are not given come from
the training_args.bin beside it (--probe_rework.from_checkpoint). The options below are the keys of a YAML file.""",
    "demo": """Probe the built-in demo policy, which is made at the first use (half a minute), and say what to try next.

examples:
  entropy-probe demo
  entropy-probe demo --probe_rework.learning_rate 5e-3

The options below are those of entropy-probe run; their defaults here are those of the configuration quickstart.""",
    "attribute": """Probe a checkpoint and say which tokens of the update did it.

examples:
  entropy-probe attribute --config quickstart
  entropy-probe attribute --config my.yaml --checkpoint /path/to/checkpoint-60 --attribution.states 64

It is entropy-probe run with --attribution.enabled true: what every token of U adds to deltaH1 and to the expected
reward, sums by class, whose doing the change of a state's entropy is (coupling), and how well the formulas of the
literature rank the tokens.
--config takes a YAML file, or the name of a configuration that comes with the package:
  {configs}
--checkpoint takes the folder of a checkpoint; it is short for --checkpoint.checkpoint_path. The options below are the
keys of a YAML file.""",
    "whatif": """Probe a checkpoint and say what other updates would do to its entropy and to its reward.

examples:
  entropy-probe whatif --config quickstart
  entropy-probe whatif --config quickstart --interventions "[clip_cov, 'stare(weight=1.05)+entropy_bonus(coef=0.01)']"
  entropy-probe whatif --config quickstart --exact "[positive_advantage]" --target_deltaH -0.001

It is entropy-probe attribute with --whatif.enabled true. Without --interventions all of them are compared, with their
published defaults, each by the step that the optimizer would take; --exact (names, or all) measures those steps too;
--target_deltaH solves for the learning rate and the entropy bonus whose step is predicted to change the entropy by so
many nats per token, and measures it. docs/interventions.md lists the interventions; so does an unknown name.
--config takes a YAML file, or the name of a configuration that comes with the package:
  {configs}
--checkpoint takes the folder of a checkpoint; it is short for --checkpoint.checkpoint_path. The options below are the
keys of a YAML file.""",
    "sweep": """Probe a grid of learning rates, batch sizes, seeds and checkpoints. The same command continues it.

examples:
  entropy-probe sweep --config quickstart --eta_factors "[0.25, 0.5, 1, 2, 4, 8]"
  entropy-probe sweep --config quickstart --B_E "[128, 512, 2048]" --seeds "[0, 1, 2]"

lists: {lists}; --output_folder FOLDER keeps the points, --overwrite starts anew.
--config takes a YAML file, or the name of a configuration that comes with the package:
  {configs}
--checkpoint takes the folder of a checkpoint; it is short for --checkpoint.checkpoint_path. The options below are the
keys of a YAML file.""",
    "compare": """Compare two runs by their logs: B - A of entropies and changes, with standard errors and intervals.

examples:
  entropy-probe compare A.json.gz B.json.gz
  entropy-probe compare A.json.gz B.json.gz --output.results_path comparison.json

On the same E the errors are paired: what both runs share cancels. The two logs have what it takes from
detailed_logging.level detailed on. B is on the E of A with --batch_config.E_rollouts A.json.gz, or with A's
seed_everything and sizes of E. Where the two E differ, --unpaired takes their errors as independent.""",
    "plan": """From one small pilot: which B_E and B_U would resolve the update, with an interval, and at what cost.

examples:
  entropy-probe plan --config quickstart
  entropy-probe plan --config my.yaml --checkpoint /path/to/checkpoint-60 --pilot_B_E 128 --power 0.9

The pilot is the run of the configuration with --pilot_B_E prompts in E. --output.results_path FILE.json has the plan.
--config takes a YAML file, or the name of a configuration that comes with the package:
  {configs}
--checkpoint takes the folder of a checkpoint; it is short for --checkpoint.checkpoint_path. The options below are the
keys of a YAML file.""",
    "report": """Make one self-contained HTML page of what a run or a training has left.

examples:
  entropy-probe report lightning_logs/2025-01-15/entropy_probe_14-30-25_step_60.json.gz
  entropy-probe report checkpoint-100/trainer_state.json --output training.html
  entropy-probe report lightning_logs/version_0

LOG is one of these:
  the log or summary of a run (.json, .json.gz); at the level debug it has every token
  trainer_state.json of a transformers or TRL training with the probe in it
  metrics.csv of Lightning's CSVLogger
  a folder with TensorBoard's events""",
}
NEXT_STEPS = """
Next:
  {bin}tensorboard --logdir lightning_logs
      look at the diagnostics
  {bin}entropy-probe demo --probe_rework.learning_rate 5e-3
      a larger step: where does first order end?
  {bin}entropy-probe attribute --config quickstart
      which tokens did it; entropy-probe whatif says what other updates would do
  {bin}entropy-probe run --checkpoint FOLDER \\
      --batch_config.dataset_name prompts.jsonl --batch_config.split train \\
      --batch_config.reward my_rewards:accuracy
      your own checkpoint, prompts and reward (run --help has every option)"""
