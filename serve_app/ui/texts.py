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
        "A few words are enough, in English or Chinese. Ctrl + Enter draws.",
        "几个词就够了，中文、英文都可以。按 Ctrl + Enter 开始。",
    ),
    "examples": Text("Or try one of these", "或者试试这些"),
    "generate": Text("Draw", "开始画"),
    "stop": Text("Stop", "停止"),
    "enhance": Text("Enhance the prompt", "润色提示词"),
    "enhance_hint": Text(
        "Adds words for quality, and what to avoid.", "补上描述画质的词，以及要避免的内容。"
    ),
    "refine": Text("Strengthen fine detail", "强化细节"),
    "refine_hint": Text(
        "Sharpens fine structure; even areas stay as they are.", "锐化细小的结构；平滑区域保持不变。"
    ),
    "negative": Text("What to avoid", "不要出现"),
    "negative_hint": Text("for example: blurry, text", "例如：模糊，文字"),
    "size": Text("Size", "尺寸"),
    "steps": Text("Steps", "步数"),
    "guidance": Text("Guidance (CFG)", "引导强度（CFG）"),
    "seed": Text("Seed", "种子"),
    "seed_hint": Text("Empty: a new one each time", "留空：每次都换"),
    "settings": Text("Settings", "设置"),
    "picture": Text("Picture", "图片"),
    "download": Text("Download PNG", "下载 PNG"),
    "reuse_seed": Text("Reuse this seed", "沿用这个种子"),
}

#: What the page says as things happen; filled in on the server, in the page's language.
MESSAGES: dict[str, Text] = {
    "used_seed": Text("Seed", "种子"),
    "used_size": Text("Size", "尺寸"),
    "larger": Text("Show it larger", "放大查看"),
    "use_seed": Text("Use this seed", "用这个种子"),
    "download_one": Text("Save", "保存"),
    "used_time": Text("Time", "用时"),
    "used_loras": Text("LoRA", "LoRA 模型"),
    "used_levers": Text("Accelerated", "已加速"),
    # What acted, by the engine's names.
    "lever_attention_cudnn": Text("attention by cuDNN", "cuDNN 注意力"),
    "lever_attention_flash": Text("attention by FlashAttention", "FlashAttention 注意力"),
    "lever_attention_efficient": Text("memory-efficient attention", "省显存注意力"),
    "lever_channels_last_vae": Text("channels-last VAE", "VAE 通道后置排列"),
    "lever_compiled": Text("compiled blocks", "编译模型块"),
    "lever_cuda_graphs": Text("compiled blocks in CUDA graphs", "编译模型块并录成 CUDA 图"),
    "seconds": Text("{seconds:.1f} s", "{seconds:.1f} 秒"),
    "starting": Text("Reading your words…", "正在理解你的描述…"),
    "queued": Text("Number {position} in the queue…", "正在排队：第 {position} 位…"),
    "queued_for": Text(
        "Number {position} in the queue, about {seconds:.0f} s…",
        "正在排队：第 {position} 位，约 {seconds:.0f} 秒…",
    ),
    "outline": Text("Step {step} of {steps}: outline", "第 {step}/{steps} 步：勾轮廓"),
    "detail": Text("Step {step} of {steps}: detail", "第 {step}/{steps} 步：画细节"),
    "time_left": Text("{text}, {seconds} s left", "{text}，还需 {seconds} 秒"),
    "stopped": Text("Stopped. Draw again whenever you like.", "已停止。可以随时重新开始。"),
    "finishing": Text("Finishing the picture…", "正在完成图片…"),
    "model_loading": Text("The model is loading…", "模型正在加载…"),
    "waiting_for_model": Text(
        "The model is still loading; your picture comes right after.", "模型仍在加载，加载完马上开始画。"
    ),
    "added": Text("Added to your prompt", "为你补充了"),
    "rewritten": Text("Rewritten by a language model", "由语言模型改写"),
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
    # What the guard found and did, from the codes of its trace.
    "guard_title": Text("What the guard did", "保护机制做了什么"),
    "guard_trip": Text("{stage} {finding}. Tried: {attempts}.", "{stage}{finding}。尝试过：{attempts}。"),
    "guard_step": Text("Step {step}: {trip}", "第 {step} 步：{trip}"),
    "guard_picture": Text("Picture {number}, {trip}", "第 {number} 张，{trip}"),
    "guard_encode": Text("the text encoder's answer", "文本编码的结果"),
    "guard_source": Text("the encoded picture to draw from", "输入图片的编码"),
    "guard_denoise": Text("the denoiser's output", "去噪网络的输出"),
    "guard_decode": Text("the decoded picture", "解码出的图片"),
    "guard_finished": Text("the finished picture", "画好的图片"),
    "guard_nan": Text("was not a number", "不是有效数字"),
    "guard_inf": Text("was infinite", "是无穷大"),
    "guard_large": Text("was absurdly large", "大得不合理"),
    "guard_wrong": Text("looked wrong", "看起来不对"),
    "guard_same_inputs": Text("the same once more", "用相同的输入重算"),
    "guard_lower_guidance": Text("less guidance", "降低引导强度"),
    "guard_plain_attention": Text("attention without fused kernels", "不用融合内核计算注意力"),
    "guard_float32": Text("computing in float32", "改用 float32 计算"),
    "guard_rest_float32": Text("computing all the rest in float32", "其余步骤都改用 float32"),
    "guard_tiled": Text("decoding in pieces", "分块解码"),
    "guard_recovered": Text("{rung} (this helped)", "{rung}（有效）"),
    "guard_failed": Text("{rung} (this did not)", "{rung}（无效）"),
}

#: What the page's own scripts say, by the keys that they use: `static/words.js` looks them up. {fields} are
#: filled in by the scripts as they stand, without formats.
SCRIPT_TEXTS: dict[str, Text] = {
    # Whether the server answers.
    "connection_lost": Text(
        "Connection lost. Trying again; nothing that you typed is lost.",
        "连接已断开，正在重试。已填写的内容不会丢失。",
    ),
    "connection_again": Text("Connected again.", "已重新连接。"),
    "drawing_interrupted": Text(
        "Connected again. The drawing was interrupted; draw it again whenever you like.",
        "已重新连接。刚才的绘制被中断了，可以随时重新开始。",
    ),
    # What the words of a prompt speak of.
    "keywords": Text("What your words say", "从你的话里读到"),
    "kind_subject": Text("subject", "主体"),
    "kind_style": Text("style", "风格"),
    "kind_material": Text("material", "材质"),
    "kind_light": Text("light", "光线"),
    "kind_scene": Text("scene", "场景"),
    "kind_quality": Text("quality", "画质"),
    "kind_quoted": Text("to be written", "要写出的字"),
    "not_wanted": Text("not wanted", "不要"),
    "tokens": Text("{tokens} of {limit} tokens", "{tokens}/{limit} 个词元"),
    "cut_at": Text(
        "{tokens} tokens, and the model reads {limit}. It will not read: “{rest}”",
        "共 {tokens} 个词元，模型只读 {limit} 个。读不到的是：“{rest}”",
    ),
    # What the enhancer is about to do.
    "will_add": Text("Will add: {phrases}", "将补充：{phrases}"),
    "will_rewrite": Text(
        "A language model rewrites it for the picture; if that fails: {phrases}",
        "绘制时由语言模型改写；不成功则补充：{phrases}",
    ),
    "will_add_nothing": Text("Nothing to add: your words say it all.", "无需补充：你的话已经很完整。"),
    "will_add_off": Text("Drawn from your words as they are.", "完全按照你的原话绘制。"),
    "will_add_later": Text(
        "What is added is shown here as you write.", "写提示词时，这里会显示将补充的内容。"
    ),
    "added": Text("Added to your prompt", "为你补充"),
    "added_negative": Text("Kept out", "要避开"),
    "respected": Text("Respected, so not added", "尊重你的意思，未补充"),
    "reason_missing": Text("nothing was said about it", "没有提到这方面"),
    "reason_said": Text("already said: “{about}”", "已说过：“{about}”"),
    "reason_kind_said": Text("“{about}” speaks of it already", "“{about}”已经说到这方面"),
    "reason_against": Text("it would go against “{about}”", "与“{about}”相反"),
    "reason_refused": Text("you ruled it out: “{about}”", "你已排除：“{about}”"),
    "reason_no_room": Text("there is no room left for it", "已没有位置"),
    "no_picture": Text("The place for the picture", "图片将显示在这里"),
    # Profiles.
    "profile": Text("Profile", "方案"),
    "profile_draft": Text("Draft", "草稿"),
    "profile_fast": Text("Fast", "快速"),
    "profile_balanced": Text("Balanced", "均衡"),
    "profile_draft_hint": Text(
        "{steps} steps without guidance: a quick look at an idea.", "{steps} 步，无引导：快速看看想法。"
    ),
    "profile_fast_hint": Text(
        "{steps} steps without guidance: twice as fast.", "{steps} 步，无引导：快一倍。"
    ),
    "profile_balanced_hint": Text(
        "{steps} steps at guidance {guidance}: as the model draws best.",
        "{steps} 步，引导强度 {guidance}：这个模型画得最好。",
    ),
    "profile_own_hint": Text("Your own settings.", "自定义设置。"),
    # Where values draw well, and what happens outside.
    "steps_good": Text(
        "Good from {low} to {high}, best at {best}.", "{low} 到 {high} 步为好，{best} 步最佳。"
    ),
    "steps_below": Text("Below {low}: only patches of colour are certain.", "少于 {low} 步：往往只有色块。"),
    "steps_above": Text("Above {high}: pictures turn soft and pale.", "多于 {high} 步：会发糊、褪色。"),
    "guidance_good": Text(
        "Good from {low} to {high}, best at {best}. 1 is off: twice as fast.",
        "{low} 到 {high} 为好，{best} 最佳。1 为关闭，快一倍。",
    ),
    "guidance_off": Text(
        "Guidance is off: twice as fast, and “What to avoid” has no effect.",
        "引导已关闭：快一倍，但“不要出现”不起作用。",
    ),
    "guidance_below": Text("Below {low}: pictures turn grey and weak.", "低于 {low}：发灰无力。"),
    "guidance_above": Text("Above {high}: pictures burn out, edges tear.", "高于 {high}：会过曝，边缘撕裂。"),
    # Sizes.
    "aspect": Text("Shape", "画幅"),
    "size": Text("Size", "尺寸"),
    "size_native": Text("The model's own size.", "模型的原生尺寸。"),
    "size_as_wide": Text("About as many pixels as the model's own size.", "像素与模型的原生尺寸相近。"),
    "size_empty": Text("Width × height, such as {example}.", "宽 × 高，例如 {example}。"),
    "size_unreadable": Text(
        "Write it as width × height, such as {example}.", "请写成宽 × 高，例如 {example}。"
    ),
    "size_snapped": Text(
        "{changes}: the model draws in multiples of {multiple}.", "{changes}：模型按 {multiple} 的倍数绘制。"
    ),
    "size_bounded": Text(
        "{changes}: the model draws {least} to {most} pixels a side.",
        "{changes}：模型每边可画 {least} 到 {most} 像素。",
    ),
    "size_far": Text(
        "Far from what the model draws best: things may repeat or go missing.",
        "与模型擅长的尺寸相差太多：画面可能重复、缺失。",
    ),
    # Seed, number of pictures, models, LoRAs.
    "dice": Text("Roll a new seed", "掷一个新种子"),
    "lock": Text("Keep the seed of the last picture", "保持上一张图的种子"),
    "count": Text("Pictures", "张数"),
    "exact_asked": Text(
        "Exactly as first drawn, without what is quicker here", "与原图逐位一致，不使用本机的加速方式"
    ),
    "model": Text("Model", "模型"),
    "model_ready": Text("loaded", "已加载"),
    "model_loading_now": Text("loading", "正在加载"),
    "model_loading_part": Text("loading, {percent} %", "正在加载 {percent}%"),
    "model_not_loaded": Text("loaded when it first draws", "首次绘制时加载"),
    "model_failed": Text("cannot be loaded", "无法加载"),
    "loras": Text("LoRAs", "LoRA 模型"),
    "lora_weight": Text("Weight of {name}", "{name} 的权重"),
    "lora_words": Text("Words that wake it: {words}", "触发词：{words}"),
    # The bar at the bottom, and the switches.
    "model_loading": Text("The model is loading…", "模型正在加载…"),
    "model_loading_read": Text(
        "The model is loading: {percent} % is read", "模型正在加载：已读取 {percent}%"
    ),
    "model_loading_hint": Text(
        "The first start takes about half a minute. You can write already.",
        "首次启动约需半分钟，可以先写提示词。",
    ),
    "device_unknown": Text("Device: not known", "设备：未知"),
    "workers_one": Text("1 worker", "1 个绘图进程"),
    "workers_more": Text("{workers} workers", "{workers} 个绘图进程"),
    "workers_none": Text("no worker", "没有绘图进程"),
    "queue_idle": Text("queue empty", "无人排队"),
    "queue_drawing": Text("drawing {drawing}", "正在画 {drawing} 张"),
    "queue_waiting": Text("drawing {drawing}, {waiting} waiting", "正在画 {drawing} 张，{waiting} 张排队"),
    "theme_system": Text("Colours: as the system", "颜色：跟随系统"),
    "theme_light": Text("Colours: light", "颜色：浅色"),
    "theme_dark": Text("Colours: dark", "颜色：深色"),
    "language_switch": Text("Show this page in Chinese", "用英文显示本页（English）"),
    # What is kept: the gallery, one picture large, two side by side.
    "keep_unreachable": Text("The server cannot be reached at the moment.", "现在连不上服务器。"),
    "keep_close": Text("Close", "关闭"),
    "keep_cancel": Text("Cancel", "取消"),
    "keep_again": Text("Try again", "再试一次"),
    "keep_undo": Text("Undo", "撤销"),
    "keep_on": Text("on", "开"),
    "keep_off": Text("off", "关"),
    "keep_none": Text("none", "无"),
    "refused_no_parameters": Text(
        "This picture does not tell how it was drawn.",
        "这张图片里没有绘制参数：它不是在这里画的，或被别的程序重新保存过。",
    ),
    "refused_invalid_image": Text("This picture cannot be read.", "这张图片无法读取。"),
    "refused_history_off": Text("This server keeps no history.", "这台服务器不保存历史记录。"),
    "refused_history_unavailable": Text(
        "The history cannot be read at the moment.", "历史记录暂时无法读取，画图不受影响，请稍后再试。"
    ),
    "refused_history_picture_not_found": Text(
        "This picture is no longer there.", "这张图片已不在历史记录里。"
    ),
    "refused_queue_full": Text("Many pictures wait already.", "现在排队的图片很多，请过几秒再试。"),
    "refused_model_not_ready": Text("The model is not ready yet.", "模型还没有准备好，请过几秒再试。"),
    "gallery_title": Text("Your pictures", "你的图片"),
    "gallery_search": Text("Search the prompts", "搜索提示词"),
    "gallery_more": Text("Show more", "显示更多"),
    "gallery_empty": Text("What you draw is kept here.", "画好的图片会保存在这里。"),
    "gallery_none_found": Text("No picture speaks of this.", "没有找到这样的图片。"),
    "gallery_off": Text("This server does not keep pictures.", "这台服务器不保存图片。"),
    "gallery_untold": Text("A picture without a prompt", "没有提示词的图片"),
    "gallery_removed": Text("Picture removed.", "图片已删除。"),
    "gallery_not_removed": Text("The picture could not be removed.", "图片未能删除。"),
    "gallery_remove_all": Text("Remove all…", "全部删除…"),
    "gallery_really": Text("Remove all your pictures for good?", "永久删除你的全部图片？"),
    "gallery_remove_them": Text("Remove them", "全部删除"),
    "gallery_keep": Text("Keep them", "保留"),
    "gallery_all_removed": Text("All your pictures are removed.", "全部图片已删除。"),
    "viewer_title": Text("Picture", "图片"),
    "viewer_newer": Text("Newer picture", "较新的图片"),
    "viewer_older": Text("Older picture", "较早的图片"),
    "viewer_put_back": Text("Use all its settings", "沿用全部设置"),
    "viewer_put_back_done": Text("The settings of that picture are back.", "已恢复这张图片的设置。"),
    "viewer_use_seed": Text("Use its seed", "只用种子"),
    "viewer_use_seed_done": Text("The seed of that picture is set.", "已填入这张图片的种子。"),
    "viewer_save": Text("Download", "下载"),
    "viewer_copy": Text("Copy as", "复制为"),
    "viewer_compare": Text("Compare…", "对比…"),
    "viewer_remove": Text("Remove", "删除"),
    "fact_prompt": Text("Prompt", "提示词"),
    "fact_drawn": Text("Drawn from", "实际提示词"),
    "fact_negative": Text("What to avoid", "不要出现"),
    "fact_size": Text("Size", "尺寸"),
    "fact_steps": Text("Steps", "步数"),
    "fact_guidance": Text("Guidance", "引导强度"),
    "fact_seed": Text("Seed", "种子"),
    "fact_enhance": Text("Enhance", "润色"),
    "fact_refine": Text("Fine detail", "强化细节"),
    "fact_exact": Text("Exact", "逐位一致"),
    "fact_loras": Text("LoRAs", "LoRA 模型"),
    "fact_profile": Text("Profile", "方案"),
    "fact_model": Text("Model", "模型"),
    "compare_choose": Text("Choose a second picture.", "请选择第二张图片。"),
    "compare_title": Text("Two pictures compared", "两张图片对比"),
    "compare_first": Text("Left: {prompt}", "左：{prompt}"),
    "compare_second": Text("Right: {prompt}", "右：{prompt}"),
    "compare_slider": Text("Where the left picture ends", "左右分界"),
    "compare_at": Text("{percent} % of the left picture", "左图 {percent}%"),
    "compare_differences": Text("What differs", "不同之处"),
    "compare_left": Text("Left", "左"),
    "compare_right": Text("Right", "右"),
    "compare_same": Text("Both were drawn with the same settings.", "两张图的设置完全相同。"),
    # Handing parameters on, and taking them in.
    "share_title": Text("Copy these settings as", "把当前设置复制为"),
    "copy_curl": Text("curl", "curl 命令"),
    "copy_python": Text("Python", "Python 代码"),
    "copy_link": Text("Link", "链接"),
    "copied_curl": Text("The command is on the clipboard.", "命令已复制。"),
    "copied_python": Text("The program is on the clipboard.", "代码已复制。"),
    "copied_link": Text(
        "The link is on the clipboard; no server is told what it says.",
        "链接已复制，其中的内容不会发给服务器。",
    ),
    "copy_by_hand": Text("Press Ctrl + C to copy.", "请按 Ctrl + C 复制。"),
    "link_filled": Text("The settings of the link are in place.", "已按链接填好设置。"),
    "link_unusable": Text(
        "This link is broken or none of ours, so nothing was set.",
        "这个链接不完整或不是本页的链接，没有改动任何设置。",
    ),
    "drop_choose": Text("Read a picture’s settings…", "读取图片的设置…"),
    "drop_hint": Text(
        "Or drop a picture anywhere on this page, or paste it.", "也可以把图片拖到本页任意处，或直接粘贴。"
    ),
    "drop_here": Text("Drop it: its settings fill the page", "松开鼠标，读取它的设置"),
    "drop_reading": Text("Reading {name}…", "正在读取 {name}…"),
    "drop_other_kind": Text(
        "{name} is no PNG, WebP or JPEG; nothing was changed.",
        "{name} 不是 PNG、WebP 或 JPEG 图片，没有改动任何设置。",
    ),
    "drop_failed": Text("No settings were read from {name}.", "没能从 {name} 读到设置。"),
    "drop_from_here": Text("The settings of {name} are in place.", "已按 {name} 填好设置。"),
    "drop_from_a1111": Text(
        "The settings of {name}, made by AUTOMATIC1111, are in place.",
        "已按 {name}（AUTOMATIC1111）填好设置。",
    ),
    "drop_from_comfyui": Text(
        "The settings of {name}, made by ComfyUI, are in place.", "已按 {name}（ComfyUI）填好设置。"
    ),
    "drop_ignored": Text("Left out: {field} {value}. {reason}", "未采用：{field} {value}。{reason}"),
    "drop_no_setting": Text("There is no such setting here.", "这里没有这项设置。"),
    "drop_no_model": Text("There is no model of this name here.", "这里没有这个模型。"),
    "drop_no_lora": Text("There is no LoRA of this name here.", "这里没有这个 LoRA 模型。"),
    "drop_only_first": Text(
        "Of {pictures} pictures the first was read.", "共 {pictures} 张图片，只读取了第一张。"
    ),
    # Grids.
    "grid_title": Text("Grid", "网格"),
    "grid_hint": Text("Several seeds, or steps against guidance.", "比较不同种子，或步数与引导强度。"),
    "grid_kind": Text("What varies", "比较什么"),
    "grid_of_seeds": Text("Seeds", "种子"),
    "grid_of_steps": Text("Steps and guidance", "步数与引导强度"),
    "grid_how_many": Text("Pictures", "张数"),
    "grid_steps": Text("Steps", "步数"),
    "grid_guidance": Text("Guidance", "引导强度"),
    "grid_steps_unreadable": Text(
        "Steps are whole numbers from 1 to 100 with commas between them, such as 4, 8, 12.",
        "步数应为 1 到 100 的整数，用逗号分隔，例如 4, 8, 12。",
    ),
    "grid_guidance_unreadable": Text(
        "Guidances are numbers from 0 to 20 with commas between them, such as 1, 1.8, 2.5.",
        "引导强度应为 0 到 20 的数，用逗号分隔，例如 1, 1.8, 2.5。",
    ),
    "grid_too_many": Text(
        "That would be {pictures} pictures; a grid has at most {most}.",
        "这样共有 {pictures} 张，一个网格最多 {most} 张。",
    ),
    "grid_prompt_empty": Text("Write in a few words what you want to see.", "请先用几个词写下想画的内容。"),
    "grid_draw": Text("Draw the grid", "开始画网格"),
    "grid_stop": Text("Stop", "停止"),
    "grid_sheet": Text("Download as one picture", "下载整张网格图"),
    "grid_sheet_failed": Text("The pictures of the grid could not be put together.", "网格图未能合成。"),
    "grid_count": Text("{pictures} pictures.", "共 {pictures} 张。"),
    "grid_count_and_time": Text("{pictures} pictures, about {time}.", "共 {pictures} 张，约 {time}。"),
    "grid_seconds": Text("{seconds} s", "{seconds} 秒"),
    "grid_minutes": Text("{minutes} min", "{minutes} 分钟"),
    "grid_at": Text("Drawing {number} of {pictures}. Left:", "正在画第 {number}/{pictures} 张。剩余："),
    "grid_waits": Text(
        "Others are before; the grid goes on by itself.", "前面还有人在排队，轮到时会自动继续。"
    ),
    "grid_done": Text("All {pictures} pictures are drawn and kept.", "{pictures} 张已全部画好。"),
    "grid_stopped": Text(
        "Stopped: {number} of {pictures} are drawn.", "已停止：画好 {number}/{pictures} 张。"
    ),
    "grid_ended": Text("{number} of {pictures} are drawn.", "画好 {number}/{pictures} 张。"),
    "grid_column": Text("{steps} steps", "{steps} 步"),
    "grid_row": Text("CFG {guidance}", "引导 {guidance}"),
    "grid_seed": Text("Seed {seed}", "种子 {seed}"),
    "grid_cell": Text("{steps} steps, guidance {guidance}", "{steps} 步，引导强度 {guidance}"),
    "grid_caption": Text("{prompt} · seed {seed}", "{prompt} · 种子 {seed}"),
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
    "guard_recovered": "绘制途中出现了异常数值，已自动恢复，详情如下。",
    "guidance_lowered": "绘制途中数值溢出，引导强度已自动调低。请使用较低的引导强度或换一个种子。",
    "values_clipped": "绘制途中有数值超出正常范围，已被截断，画面可能受影响。",
    "picture_redrawn": "第一次画出的图看起来不对，已用 float32 重画，这里显示的是重画的结果。",
    "result_not_kept": "这张图片没能存到服务器上，因此直接放在回答里。",
    "watermark_unreadable": (
        "这张图里的隐形水印读不出来：尺寸太小、画面太单一，或压缩太多。请用 PNG 或更大的尺寸。"
    ),
    "history_not_kept": "图片已画好，但没能存进历史记录。请先下载，以免丢失。",
    "prompt_not_rewritten": "语言模型改写的提示词没有采用（没写完、出错，或丢了原文的内容），改用规则润色。",
    "picture_noise": "这张图布满噪点，像是没有画完。请换一个种子或增加步数再试。",
}
REFUSALS_IN_CHINESE: dict[str, str] = {
    "history_off": "这台服务器不保存历史记录。",
    "history_unavailable": "历史记录暂时无法读取，画图不受影响，请稍后再试。",
    "history_picture_not_found": "历史记录里没有这张图片，可能已被删除，或属于别人。",
    "no_parameters": "这张图片里没有绘制参数：它不是在这里画的，或被别的程序重新保存过。",
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
    "signing_failed": "图片已画好，但没能签名，因此没有给出。请稍后再试，或联系管理员检查签名证书。",
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
