"""Every sentence that the page says, in English and Chinese side by side.

A row without one of its languages cannot be written. Fields in braces are filled by `say`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from zimage_engine.types import Notice

Language = Literal["en", "zh"]


class Text(NamedTuple):
    """One thing to say, in both languages of the page."""

    en: str
    zh: str


#: The locales that Gradio's own frontend knows, and the column of the table that serves each.
LOCALES: dict[str, Language] = {"en": "en", "zh-CN": "zh", "zh-TW": "zh"}

#: Labels and hints: fixed, translated in the browser.
LABELS: dict[str, Text] = {
    "prompt": Text("What shall I draw?", "想画什么？"),
    "prompt_hint": Text(
        "A few words are enough, in English or Chinese. Shift + Enter draws.",
        "几个词就够了，中文、英文都可以。按 Shift + Enter 开始。",
    ),
    "examples": Text("Or try one of these", "或者试试这些"),
    "generate": Text("Draw", "开始画"),
    "enhance": Text("Enhance the prompt", "润色提示词"),
    "enhance_hint": Text(
        "Adds words for quality, and what to avoid.", "补上描述画质的词，以及要避免的内容。"
    ),
    "refine": Text("Strengthen fine detail", "强化细节"),
    "refine_hint": Text(
        "Works with “Enhance”; even areas stay as they are.", "与“润色”同时起作用；平滑区域保持不变。"
    ),
    "negative": Text("What to avoid", "不要出现"),
    "negative_hint": Text("for example: blurry, text", "例如：模糊，文字"),
    "size": Text("Size", "尺寸"),
    "size_hint": Text("Choose one or type it.", "可选，也可输入。"),
    "steps": Text("Steps", "步数"),
    "steps_hint": Text("8 is best: first the outline, then the detail.", "8 步最好：先勾轮廓，再画细节。"),
    "guidance": Text("Guidance (CFG)", "引导强度（CFG）"),
    "guidance_hint": Text("1.8 is best. 1.0 is off: twice as fast.", "1.8 最好。1.0 为关闭，快一倍。"),
    "seed": Text("Seed", "种子"),
    "seed_hint": Text("Empty: random.", "留空则随机。"),
    "settings": Text("Settings", "设置"),
    "picture": Text("Picture", "图片"),
    "download": Text("Download PNG", "下载 PNG"),
    "reuse_seed": Text("Reuse this seed", "沿用这个种子"),
}

#: What the page says as things happen; filled in on the server, in the page's language.
MESSAGES: dict[str, Text] = {
    "native": Text("native", "原生"),
    "used_seed": Text("Seed", "种子"),
    "used_size": Text("Size", "尺寸"),
    "used_time": Text("Time", "用时"),
    "used_loras": Text("LoRA", "LoRA 模型"),
    "seconds": Text("{seconds:.1f} s", "{seconds:.1f} 秒"),
    "starting": Text("Reading your words…", "正在理解你的描述…"),
    "queued": Text("Number {position} in the queue…", "正在排队：第 {position} 位…"),
    "queued_for": Text(
        "Number {position} in the queue, about {seconds:.0f} s…",
        "正在排队：第 {position} 位，约 {seconds:.0f} 秒…",
    ),
    "outline": Text("Step {step} of {steps}: outline", "第 {step}/{steps} 步：勾轮廓"),
    "detail": Text("Step {step} of {steps}: detail", "第 {step}/{steps} 步：画细节"),
    "finishing": Text("Finishing the picture…", "正在完成图片…"),
    "model_loading": Text("The model is loading…", "模型正在加载…"),
    "model_loading_hint": Text(
        "The first start takes about half a minute. You can write already.",
        "首次启动约需半分钟，可以先写提示词。",
    ),
    "waiting_for_model": Text(
        "The model is still loading; your picture comes right after.", "模型仍在加载，加载完马上开始画。"
    ),
    "device_unknown": Text("Device: not known", "设备：未知"),
    "added": Text("Added to your prompt", "为你补充了"),
    "added_negative": Text("Kept out", "已避开"),
    "drawn_prompt": Text("The whole prompt", "完整提示词"),
    "drawn_negative": Text("The whole list of what to avoid", "完整的避免列表"),
    "nothing_added": Text("Drawn from your words as they are.", "完全按照你的原话绘制。"),
    "notice": Text("Good to know", "提示"),
    "please_change": Text("One thing to change", "请修改一处"),
    "prompt_empty": Text("Write in a few words what you want to see.", "请先用几个词写下想画的内容。"),
    "seed_not_number": Text(
        "The seed is a whole number, or empty for a new one; it was “{value}”.",
        "种子应为整数，留空则随机；现在是“{value}”。",
    ),
    "size_not_readable": Text(
        "The size is width x height, such as {example}; it was “{value}”.",
        "尺寸应写成“宽x高”，例如 {example}；现在是“{value}”。",
    ),
    "try_again": Text("That did not work", "这次没有成功"),
}

#: The engine and the server word warnings and refusals in English. For readers of Chinese, by code: what
#: a warning means, and what stands before a refusal (whose English sentence follows, with the numbers).
NOTICES_IN_CHINESE: dict[str, str] = {
    "num_inference_steps_outside_range": "步数不在推荐范围内：过少只有色块，过多会发糊、褪色。8 步最好。",
    "guidance_scale_outside_range": "引导强度不在推荐范围内：过低发灰无力，过高会过曝、边缘撕裂。1.8 最好。",
    "size_outside_range": "这个尺寸与模型擅长的尺寸相差太多：画面可能重复、缺失。请换回原生尺寸。",
    "source_scaled": "输入图片已缩放到绘制所用的尺寸。",
    "strength_raised": "至少要画一步：按所选的步数，实际的重绘强度高于所填的值。要保留更多原图，请增加步数。",
    "source_cut": "所选尺寸与输入图片的长宽比不同，超出的边缘已被裁去。要保留全图，请选用相同的长宽比。",
    "prompt_truncated": "提示词太长，模型读不完，末尾的部分被略去了。请缩短。",
    "negative_prompt_truncated": "“不要出现”的内容太长，模型读不完，末尾的部分被略去了。请缩短。",
    "picture_black": "这张图全黑了。请换一个种子或降低引导强度再试。",
    "picture_flat": "这张图只有一种颜色。请换一个种子或改写提示词再试。",
    "picture_black_borders": "这张图的边缘有黑边。请换一个种子再试。",
    "picture_blocks": "这张图有几处被纯色方块盖住了。请换一个种子再试。",
    "guard_recovered": "绘制途中出现了异常数值，已自动恢复，详情见报告。",
    "guidance_lowered": "绘制途中数值溢出，引导强度已自动调低。请使用较低的引导强度或换一个种子。",
    "values_clipped": "绘制途中有数值超出正常范围，已被截断，画面可能受影响。",
    "picture_redrawn": "第一次画出的图看起来不对，已用 float32 重画，这里显示的是重画的结果。",
    "result_not_kept": "这张图片没能存到服务器上，因此直接放在回答里。",
    "picture_noise": "这张图布满噪点，像是没有画完。请换一个种子或增加步数再试。",
}
REFUSALS_IN_CHINESE: dict[str, str] = {
    "jobs_unavailable": "任务现在不可用：任务数据库无法使用，请稍后再试。",
    "files_unavailable": "存放图片的地方暂时没有回应，请稍后再试。",
    "job_not_found": "没有这个任务，或者它属于别人。",
    "job_abandoned": "这个任务画了几次，每次绘图进程都意外停止。如果图片很大，请缩小尺寸。",
    "job_expired": "这个任务等得太久，一直没有能画它的服务器，请重新提交。",
    "result_not_kept": "图片已画好，但没能存到服务器上，请稍后再试，或直接请求图片。",
    "server_ending": "服务器正在停止，请稍等片刻再试。",
    "result_expired": "任务已完成，但图片已过期。请用同一个种子重新绘制。",
    "too_many_jobs": "还没完成的任务太多了，请等其中一些完成。",
    "idempotency_key_reused": "这个 Idempotency-Key 已用于另一个请求，请换一个。",
    "invalid_value": "有一项设置无法使用：",
    "invalid_image": "图片或蒙版无法使用：",
    "invalid_multipart": "表单无法读取：",
    "queue_full": "现在排队的图片很多，请过几秒再试。",
    "rate_limit_exceeded": "你提交得太多或太快了，请稍等片刻再试。",
    "model_not_ready": "模型还没有准备好，请过几秒再试。",
    "model_load_failed": "这个模型无法加载，稍后会再试；其他模型可以照常使用。",
    "worker_lost": "绘图进程意外停止，正在重新启动。请再试一次；如果图片很大，请缩小尺寸。",
    "request_kills_workers": (
        "两个绘图进程都在画这张图时意外停止，因此不再重试，一小时内也不再接受同样的请求。"
        "请缩小尺寸、减少步数或换一个提示词。"
    ),
    "cancelled": "绘制在完成前被停止了，请再试一次。",
    "deadline_exceeded": "没能在规定的时间内画完。请减少步数、缩小尺寸，或延长时间。",
    "does_not_fit": "显存放不下这个尺寸，请缩小尺寸。",
    "guard_exhausted": "绘制途中反复出现异常数值，无法恢复，因此没有出图。请换种子或提示词，并检查模型文件。",
    "schedule_invalid": "模型的调度器配置有误，无法绘制。请换一个步数，或检查模型文件。",
    "out_of_memory": "显存不足，能腾出的都已腾出，仍画不了这张图。请缩小尺寸，或稍后再试。",
    "device_unavailable": "绘图设备不可用。",
    "device_failed": "绘图设备在绘制途中出了故障，正在更换绘图进程。请稍后再试。",
    "engine_error": "服务器在画这张图时出了问题，详情见服务器日志。",
    "internal_error": "服务器在画这张图时出了问题，提示词没有问题。详情见服务器日志。",
}

#: Clicked into the prompt; all are within what the embedded model knows.
EXAMPLES: tuple[str, ...] = (
    "a red circle on a white background, a small yellow star at the top",
    "白色背景上的红色圆形",
    "a red house and a tree by day with mountains",
    "夜晚的大海，月亮和白色的小船",
)


def language_of(locale: str | None) -> Language:
    """The column for a locale that the browser page named; English for any that we do not speak."""
    return LOCALES.get(locale or "en", "en")


def say(key: str, language: Language, **values: object) -> str:
    """The message in the language, its fields filled in. Plain text: escape it before it becomes HTML."""
    return str(getattr(MESSAGES[key], language)).format(**values)


def notice_sentence(notice: Notice, language: Language) -> str:
    """A warning in the language, or as the engine worded it where we have no words for its code."""
    return NOTICES_IN_CHINESE.get(notice.code, notice.message) if language == "zh" else notice.message


def refusal_in_chinese(code: str) -> str:
    """What a refusal of the server means; "" for a code that we have no words for."""
    return REFUSALS_IN_CHINESE.get(code, "")


def translations() -> dict[str, dict[str, str]]:
    """The labels as Gradio's I18n takes them: for each locale, key to text."""
    return {
        locale: {key: str(getattr(text, language)) for key, text in LABELS.items()}
        for locale, language in LOCALES.items()
    }
