"""A run whose prepare, finetune and distill look finished: tiny models, a few questions. No training."""

from ray_jobs.core.records import Question, content_id
from ray_jobs.core.run_folder import RunFolder


def make_run(config, *, num_questions: int = 5, adapter_scale: float = 0.5):
    """Write the stages' results that answering and serving read; return the RunFolder."""
    folder = RunFolder(config)
    for name in ("prepare", "finetune", "distill"):
        stage = folder.stage(name, sections=[], after=[], force=True)
        WRITERS[name](stage.folder, config, num_questions if name == "prepare" else adapter_scale)
        stage.finish(counts={}, headline=[])
    return folder


def _questions(storage, config, num_questions):
    texts = [f"What is part {i} of the {'very ' * i}small machine?" for i in range(num_questions)]
    rows = [Question(question_id=content_id(text), question=text, reference="A part. It works.") for text in texts]
    storage.write_jsonl("questions.jsonl", [row.model_dump() for row in rows])


def _adapter(storage, config, scale):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(config.teacher.model), LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=scale)
    model.save_pretrained(f"{storage.root}/adapter")


def _student(storage, config, _):
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    torch.manual_seed(2)  # and wide weights: a narrow random model repeats its last token, as the base does
    LlamaForCausalLM(AutoConfig.from_pretrained(config.teacher.model, num_hidden_layers=2, initializer_range=0.3)).save_pretrained(
        f"{storage.root}/student"
    )
    AutoTokenizer.from_pretrained(config.teacher.model).save_pretrained(f"{storage.root}/student")


WRITERS = {"prepare": _questions, "finetune": _adapter, "distill": _student}
