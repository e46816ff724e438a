"""The words of the READMEs' results in each language: headings, sentences, names of rows.

It knows texts, and no figure: what stands in braces is filled in by `readme`, formatted once for
all languages. A new sentence needs an entry in every catalogue; a test compares their keys and
braces.
"""

from __future__ import annotations

from collections.abc import Mapping

Catalogue = Mapping[str, str]

ENGLISH: Catalogue = {
    "conditions": "{model} on {cores} cores of an {cpu}, {dtype} compute, torch {torch}, "
    "transformers {transformers}, bitsandbytes {bitsandbytes}, {date}; files and commands in "
    "[bench/results](bench/results).",
    # Arms and states
    "reference": "unquantised",
    "alpha1": "**alpha = 1**",
    "alpha0": "**alpha = 0**",
    "plain": "plain INT4, no ortho",
    "nf4": "bitsandbytes NF4",
    "state alpha1": "alpha = 1",
    "state alpha0": "alpha = 0",
    "state never": "never trained",
    # Experiment 1
    "kill switch": "Experiment 1, kill switch. Loss is the mean in nats per secret token; twins "
    "were never planted.",
    "extracted": "extracted",
    "loss on planted": "loss on planted",
    "loss on twins": "loss on twins",
    "hits": "{hits} of {n}",
    "privacy ratio": "Privacy ratio at least **{ratio}** (lower limit of the 95 % interval); base "
    "fingerprint {fingerprint} before tuning, after it, and in the export.",
    # Experiment 2
    "null test": "Experiment 2, null test: {windows} windows of {tokens} tokens; ratios to the "
    "unquantised model with 95 % intervals; calibrated on {calibration}.",
    "bits": "bits per linear weight",
    "perplexity": "{corpus}, perplexity",
    "ratio": "ratio",
    "not measured because": "not measured: {reason}",
    "not measured": "not measured",
    "heads": "What an 8-bit embedding and head (`--head-bits 8`) cost beside 16 bits, on {corpus} "
    "in {dtype}: ratios of {alpha1_8} beside {alpha1_16} at alpha = 1, and of {alpha0_8} beside "
    "{alpha0_16} at alpha = 0.",
    # Throughput
    "throughput": "Throughput at batch 1 on that CPU: prefill of 512 tokens, `generate` of 16 "
    "tokens after 16. Our arms hold their composed weights in memory here, as large as the "
    "unquantised ones.",
    "prefill": "prefill, tokens/s",
    "decode": "decode, tokens/s",
    "switching": "Switching alpha: {ms} ms.",
    # On a card
    "card": "The same job on an {card}, capped at 5.0 GiB, in {dtype} (torch {torch}, transformers "
    "{transformers}, {date}): {hits1} and {hits0} of {n} extracted at alpha = 1 and 0; on {corpus} "
    "perplexity ratios of {alpha1} at alpha = 1, {alpha0} at alpha = 0, {nf4} for NF4 and {plain} "
    "for plain INT4.",
    # Audits
    "audits": "Audits of {model} on an {card}, in {dtype} (torch {torch}, {date}), {n} planted "
    "records ({records}) and as many twins. Trained: records a step times steps at most. Losses in "
    "nats per secret token, exposure in bits of 3. Tests share an error rate of 5 % (Holm), the "
    "attacks included, relearning among them.",
    "seeds": "Over {seeds} seeds of {method}: {on} extracted on and {off} off, privacy ratio at "
    "least {ratio}; off, loss on twins beyond planted {gap} nats, as of a model that was never "
    "trained, and exposure {exposure}; {seen} of {tests} tests see a leak, {attacks} attacks among "
    "them.",
    "audit costs": "Such an audit of a saved artefact, without `--relearn`, took {seconds} seconds "
    "for {records} planted records and as many twins, on {cores} cores of an {cpu} in {dtype} "
    "(torch {torch}, {date}).",
    "between": ", ",
    "method": "method",
    "seed": "seed",
    "trained": "trained",
    "untrained": "never",
    "extracted on": "extracted, on",
    "extracted off": "extracted, off",
    "loss off": "loss off, planted / twins",
    "exposure off": "exposure off",
    "tests that see": "tests that see a leak",
    "attacks that see": "attacks that do",
    "verdict": "verdict",
    "not run": "not run",
    "private by construction": "*private by construction*",
    "private as far as tested": "*private as far as tested*",
    "leaks": "*leaks*",
    "inconclusive": "*inconclusive*",
    # Kernels
    "kernels": "Decode kernels on an {card} (torch {torch}, triton {triton}, {date}; copies ran at "
    "{bandwidth} GB/s, read and written): INT4 with groups of 128, one token, float16, at layer "
    "shapes of Llama; streams are 0.5 % residual and 0.5 % private. In captured steps a launch "
    "begins under the one ahead: the second ratio is of such. Each side has its own best config. "
    "Of {checked} random cases {missed} missed the float64 reference.",
    # Whole models
    "memory": "Whole models from their safetensors shards, random weights at their exact geometry, "
    "on an {card} capped at 5.0 GiB (torch {torch}, {date}): INT4 with groups of 128, 8-bit "
    "embedding and head, 0.5 % residual and 0.5 % private; separated (seconds, host memory beyond "
    "the page cache, card memory), run with 512 tokens of prompt and 32 decoded, tuned.",
    "model": "model",
    "seconds": "seconds",
    "host memory": "host memory, MiB",
    "card memory": "card memory, MiB",
    "planned": "planned for running, MiB",
    "running it": "running it, MiB",
    "tuning it": "tuning its private stream, MiB",
    "ran out of memory": "ran out of memory",
    "layer": "layer",
    "base": "base, µs",
    "share": "of copy bandwidth",
    "streams": "with streams",
    "overlapped": "with streams, overlapped",
    "int4pack": "PyTorch's INT4, µs",
    "fp16": "FP16, µs",
    # Decoding
    "decoding": "Decoding on an {card} by `generate` at batch 1 and {context} tokens of context, "
    "Llama's exact geometry with random weights, {dtype} (torch {torch}, {date}; copies ran at "
    "{bandwidth} GB/s). Projected: the same share of an RTX 4050's 192 GB/s, not measured there. "
    "Switching alpha took {switch} ms and holds from the next token on. Medians of 3, and their "
    "range, which a first token's host time makes wide. A second card of the machine was training "
    "meanwhile: what waits for the host is faster without.",
    "tokens a second": "tokens/s",
    "first token": "first token, ms",
    "reserved": "reserved, MiB",
    "projected": "projected at 192 GB/s, tokens/s",
    "ortho": "**alpha = 1**",
    "ortho at 0": "**alpha = 0**",
    "capped": "**alpha = 1**, INT8 head, not fused, capped at 5.0 GiB",
    "int4pack model": "PyTorch's INT4, no streams",
    "gemlite": "GemLite INT4, no streams",
    "nf4 captured": "bitsandbytes NF4, captured as ours",
    "nf4 eager": "bitsandbytes NF4 as it is",
    "dense": "16-bit weights, captured as ours",
}

CHINESE: Catalogue = {
    "conditions": "{model}，运行于 {cpu} 的 {cores} 个核心，以 {dtype} 计算，torch {torch}，"
    "transformers {transformers}，bitsandbytes {bitsandbytes}，{date}；结果文件与命令见 "
    "[bench/results](bench/results)。",
    "reference": "未量化",
    "alpha1": "**alpha = 1**",
    "alpha0": "**alpha = 0**",
    "plain": "普通 INT4，无 ortho",
    "nf4": "bitsandbytes NF4",
    "state alpha1": "alpha = 1",
    "state alpha0": "alpha = 0",
    "state never": "从未训练",
    "kill switch": "实验 1：开关测试（kill switch）。损失是每个秘密 token 的平均值，"
    "单位 nat；孪生记录从未植入。",
    "extracted": "被提取",
    "loss on planted": "植入记录的损失",
    "loss on twins": "孪生记录的损失",
    "hits": "{hits} / {n}",
    "privacy ratio": "隐私比至少为 **{ratio}**（95 % 区间的下限）；"
    "基座指纹 {fingerprint} 在微调前、微调后与导出的基座中完全一致。",
    "null test": "实验 2：零效应测试（null test）：{windows} 个窗口，每个 {tokens} 个 token；"
    "比值以未量化模型为基准，附 95 % 区间；校准文本为 {calibration}。",
    "bits": "每个线性权重的比特数",
    "perplexity": "{corpus}，困惑度",
    "ratio": "比值",
    "not measured because": "未测量：{reason}",
    "not measured": "未测量",
    "heads": "8 比特的嵌入层与输出头（`--head-bits 8`）相对 16 比特的代价（{corpus}，{dtype}）："
    "alpha = 1 时的比值为 {alpha1_8}，后者为 {alpha1_16}；"
    "alpha = 0 时为 {alpha0_8}，后者为 {alpha0_16}。",
    "throughput": "同一 CPU 上批大小为 1 的吞吐量：prefill 为 512 个 token，"
    "`generate` 在 16 个 token 之后再生成 16 个。"
    "此处我们的各组把合成后的权重留在内存里，与未量化的权重一样大。",
    "prefill": "prefill，token/s",
    "decode": "decode，token/s",
    "switching": "切换 alpha：{ms} ms。",
    "card": "同一任务在 {card} 上（显存限制为 5.0 GiB，{dtype}，torch {torch}，"
    "transformers {transformers}，{date}）：alpha = 1 与 0 时提取 {hits1} 条与 {hits0} 条，"
    "共 {n} 条；{corpus} 上的困惑度比值：alpha = 1 为 {alpha1}，alpha = 0 为 {alpha0}，"
    "NF4 为 {nf4}，普通 INT4 为 {plain}。",
    "audits": "在 {card} 上对 {model} 的审计，{dtype}（torch {torch}，{date}），{n} 条植入记录"
    "（{records}）与同样多的孪生记录。训练一栏：每步记录数 × 最多步数。"
    "损失为每个秘密 token 的 nat 数，暴露度以比特计，最大为 3。所有检验（含攻击，重新学习也在其中）"
    "共享 5 % 的错误率（Holm）。",
    "seeds": "{method} 的 {seeds} 个种子：开启时提取 {on}，关闭时 {off}，隐私比至少为 {ratio}；"
    "关闭时孪生记录的损失比植入记录高 {gap} nat（与从未训练的模型相同），暴露度 {exposure}；"
    "{tests} 个检验中有 {seen} 个发现泄漏，其中包含 {attacks} 种攻击。",
    "audit costs": "在 {cpu} 的 {cores} 个核心上以 {dtype} 计算（torch {torch}，{date}），"
    "对已保存的产物做一次这样的审计（不含 `--relearn`）用时 {seconds} 秒，"
    "植入记录为 {records} 条，孪生记录同样多。",
    "between": "、",
    "method": "方法",
    "seed": "种子",
    "trained": "训练",
    "untrained": "从未",
    "extracted on": "开启时被提取",
    "extracted off": "关闭时被提取",
    "loss off": "关闭时的损失，植入 / 孪生",
    "exposure off": "关闭时的暴露度",
    "tests that see": "发现泄漏的检验",
    "attacks that see": "其中的攻击",
    "verdict": "判定",
    "not run": "未运行",
    "private by construction": "*private by construction*",
    "private as far as tested": "*private as far as tested*",
    "leaks": "*leaks*",
    "inconclusive": "*inconclusive*",
    "kernels": "{card} 上的 decode 内核（torch {torch}，triton {triton}，{date}；"
    "显存拷贝的速率为 {bandwidth} GB/s，读写合计）：INT4，每组 128 个权重，单个 token，float16，"
    "层的形状取自 Llama；两个稀疏流各为 0.5 % 残差与 0.5 % 私有。"
    "在捕获的步骤中，每次启动都在前一次尚未结束时开始：第二个比值即为此情形，"
    "两侧各用其最优配置。{checked} 个随机用例中，有 {missed} 个偏离 float64 参考值。",
    "memory": "从 safetensors 分片处理整个模型（随机权重，几何形状与原模型完全一致），"
    "在 {card} 上，显存限制为 5.0 GiB（torch {torch}，{date}）：INT4，每组 128 个权重，"
    "嵌入层与输出头 8 比特，残差 0.5 %，私有流 0.5 %；拆分（秒数、不计页缓存的主机内存、显存），"
    "以 512 个 token 的提示运行并解码 32 个，再微调。",
    "model": "模型",
    "seconds": "秒",
    "host memory": "主机内存，MiB",
    "card memory": "显存，MiB",
    "planned": "计划的运行显存，MiB",
    "running it": "运行，MiB",
    "tuning it": "微调私有流，MiB",
    "ran out of memory": "显存不足",
    "layer": "层",
    "base": "基座，µs",
    "share": "占拷贝带宽",
    "streams": "加上稀疏流",
    "overlapped": "加上稀疏流，重叠启动",
    "int4pack": "PyTorch 的 INT4，µs",
    "fp16": "FP16，µs",
    "decoding": "{card} 上用 `generate` 解码（批大小 1，上下文 {context} 个 token）："
    "Llama 的真实形状与随机权重，{dtype}（torch {torch}，{date}；显存拷贝的速率为 {bandwidth} "
    "GB/s）。推算值：按 RTX 4050 的 192 GB/s 取同样的占比，并未在其上测量。"
    "切换 alpha 用时 {switch} ms，从下一个 token 起生效。数值为 3 次的中位数，方括号内为其范围，"
    "首个 token 的主机时间使范围变宽。测量时该机器的另一张卡正在训练：受主机限制的项在空闲时更快。",
    "tokens a second": "token/s",
    "first token": "首个 token，ms",
    "reserved": "预留显存，MiB",
    "projected": "192 GB/s 下的推算值，token/s",
    "ortho": "**alpha = 1**",
    "ortho at 0": "**alpha = 0**",
    "capped": "**alpha = 1**，INT8 输出层，未合并，限制为 5.0 GiB",
    "int4pack model": "PyTorch 的 INT4，无稀疏流",
    "gemlite": "GemLite INT4，无稀疏流",
    "nf4 captured": "bitsandbytes NF4，与我们同样捕获",
    "nf4 eager": "bitsandbytes NF4，原样",
    "dense": "16 位权重，与我们同样捕获",
}

CATALOGUES: Mapping[str, Catalogue] = {"README.md": ENGLISH, "README.zh-CN.md": CHINESE}
"""The words for each README."""
