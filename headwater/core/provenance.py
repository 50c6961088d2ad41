"""Where results come from: versions of what made them, and the papers to cite."""

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PAPERS: dict[str, str] = {
    "arXiv:2307.13304": """@inproceedings{chee2023quip,
  title={{QuIP}: 2-Bit Quantization of Large Language Models with Guarantees},
  author={Chee, Jerry and Cai, Yaohui and Kuleshov, Volodymyr and De Sa, Christopher},
  booktitle={Advances in Neural Information Processing Systems},
  year={2023}
}""",
    "arXiv:2308.03296": """@article{grosse2023studying,
  title={Studying Large Language Model Generalization with Influence Functions},
  author={Grosse, Roger and Bae, Juhan and Anil, Cem and others},
  journal={arXiv preprint arXiv:2308.03296},
  year={2023}
}""",
    "arXiv:1806.03884": """@inproceedings{george2018fast,
  title={Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis},
  author={George, Thomas and Laurent, C{\\'e}sar and Bouthillier, Xavier and Ballas, Nicolas and Vincent, Pascal},
  booktitle={Advances in Neural Information Processing Systems},
  year={2018}
}""",
    "arXiv:1503.05671": """@inproceedings{martens2015optimizing,
  title={Optimizing Neural Networks with {K}ronecker-factored Approximate Curvature},
  author={Martens, James and Grosse, Roger},
  booktitle={International Conference on Machine Learning},
  year={2015}
}""",
    "arXiv:1906.02353": """@article{ren2019efficient,
  title={Efficient Subsampled {G}auss-{N}ewton and Natural Gradient Methods for Training Neural Networks},
  author={Ren, Yi and Goldfarb, Donald},
  journal={arXiv preprint arXiv:1906.02353},
  year={2019}
}""",
    "arXiv:2302.03519": """@inproceedings{dhawan2023efficient,
  title={Efficient Parametric Approximations of Neural Network Function Space Distance},
  author={Dhawan, Nikita and Huang, Sicong and Bae, Juhan and Grosse, Roger},
  booktitle={International Conference on Machine Learning},
  year={2023}
}""",
    "arXiv:2209.05364": """@inproceedings{bae2022if,
  title={If Influence Functions are the Answer, Then What is the Question?},
  author={Bae, Juhan and Ng, Nathan and Lo, Alston and Ghassemi, Marzyeh and Grosse, Roger},
  booktitle={Advances in Neural Information Processing Systems},
  year={2022}
}""",
    "arXiv:1612.00796": """@article{kirkpatrick2017overcoming,
  title={Overcoming Catastrophic Forgetting in Neural Networks},
  author={Kirkpatrick, James and Pascanu, Razvan and Rabinowitz, Neil and Veness, Joel and others},
  journal={Proceedings of the National Academy of Sciences},
  volume={114},
  number={13},
  year={2017}
}""",
    "arXiv:1703.04730": """@inproceedings{koh2017understanding,
  title={Understanding Black-box Predictions via Influence Functions},
  author={Koh, Pang Wei and Liang, Percy},
  booktitle={International Conference on Machine Learning},
  year={2017}
}""",
    "arXiv:2002.08484": """@inproceedings{pruthi2020estimating,
  title={Estimating Training Data Influence by Tracing Gradient Descent},
  author={Pruthi, Garima and Liu, Frederick and Kale, Satyen and Sundararajan, Mukund},
  booktitle={Advances in Neural Information Processing Systems},
  year={2020}
}""",
    "arXiv:2405.12186": """@inproceedings{bae2024training,
  title={Training Data Attribution via Approximate Unrolled Differentiation},
  author={Bae, Juhan and Lin, Wu and Lorraine, Jonathan and Grosse, Roger},
  booktitle={Advances in Neural Information Processing Systems},
  year={2024}
}""",
    "arXiv:2503.13751": """@article{engstrom2025optimizing,
  title={Optimizing {ML} Training with Metagradient Descent},
  author={Engstrom, Logan and Ilyas, Andrew and Chen, Benjamin and Feldmann, Axel and Moses, William and M{\\k{a}}dry},
  journal={arXiv preprint arXiv:2503.13751},
  year={2025}
}""",
    "arXiv:2504.16430": """@article{ilyas2025magic,
  title={{MAGIC}: Near-Optimal Data Attribution for Deep Learning},
  author={Ilyas, Andrew and Engstrom, Logan},
  journal={arXiv preprint arXiv:2504.16430},
  year={2025}
}""",
    "arXiv:2205.15466": """@inproceedings{wang2023banzhaf,
  title={Data {Banzhaf}: A Robust Data Valuation Framework for Machine Learning},
  author={Wang, Jiachen T. and Jia, Ruoxi},
  booktitle={International Conference on Artificial Intelligence and Statistics},
  year={2023}
}""",
    "arXiv:2303.14186": """@inproceedings{park2023trak,
  title={{TRAK}: Attributing Model Behavior at Scale},
  author={Park, Sung Min and Georgiev, Kristian and Ilyas, Andrew and Leclerc, Guillaume and Madry, Aleksander},
  booktitle={International Conference on Machine Learning},
  year={2023}
}""",
    "arXiv:2410.17413": """@article{chang2024scalable,
  title={Scalable Influence and Fact Tracing for Large Language Model Pretraining},
  author={Chang, Tyler A. and Rajagopal, Dheeraj and Bolukbasi, Tolga and Dixon, Lucas and Tenney, Ian},
  journal={arXiv preprint arXiv:2410.17413},
  year={2024}
}""",
    "arXiv:2402.04333": """@inproceedings{xia2024less,
  title={{LESS}: Selecting Influential Data for Targeted Instruction Tuning},
  author={Xia, Mengzhou and Malladi, Sadhika and Gururangan, Suchin and Arora, Sanjeev and Chen, Danqi},
  booktitle={International Conference on Machine Learning},
  year={2024}
}""",
    "arXiv:2310.00902": """@inproceedings{kwon2024datainf,
  title={{DataInf}: Efficiently Estimating Data Influence in {LoRA}-tuned {LLMs} and Diffusion Models},
  author={Kwon, Yongchan and Wu, Eric and Wu, Kevin and Zou, James},
  booktitle={International Conference on Learning Representations},
  year={2024}
}""",
    "arXiv:1602.03943": """@article{agarwal2017second,
  title={Second-Order Stochastic Optimization for Machine Learning in Linear Time},
  author={Agarwal, Naman and Bullins, Brian and Hazan, Elad},
  journal={Journal of Machine Learning Research},
  volume={18},
  number={116},
  pages={1--40},
  year={2017}
}""",
    "arXiv:2112.03052": """@inproceedings{schioppa2022scaling,
  title={Scaling Up Influence Functions},
  author={Schioppa, Andrea and Zablotskaia, Polina and Vilar, David and Sokolov, Artem},
  booktitle={AAAI Conference on Artificial Intelligence},
  year={2022}
}""",
    "arXiv:2405.13954": """@article{choe2024what,
  title={What is Your Data Worth to {GPT}? {LLM}-Scale Data Valuation with Influence Functions},
  author={Choe, Sang Keun and Ahn, Hwijeen and Bae, Juhan and others},
  journal={arXiv preprint arXiv:2405.13954},
  year={2024}
}""",
    "arXiv:2006.04528": """@inproceedings{hanawa2021evaluation,
  title={Evaluation of Similarity-based Explanations},
  author={Hanawa, Kazuaki and Yokoi, Sho and Hara, Satoshi and Inui, Kentaro},
  booktitle={International Conference on Learning Representations},
  year={2021}
}""",
    "arXiv:1908.10084": """@inproceedings{reimers2019sentence,
  title={Sentence-{BERT}: Sentence Embeddings using {S}iamese {BERT}-Networks},
  author={Reimers, Nils and Gurevych, Iryna},
  booktitle={Conference on Empirical Methods in Natural Language Processing},
  year={2019}
}""",
    "arXiv:2107.07075": """@inproceedings{paul2021deep,
  title={Deep Learning on a Data Diet: Finding Important Examples Early in Training},
  author={Paul, Mansheej and Ganguli, Surya and Dziugaite, Gintare Karolina},
  booktitle={Advances in Neural Information Processing Systems},
  year={2021}
}""",
    "arXiv:2001.10528": """@inproceedings{pleiss2020identifying,
  title={Identifying Mislabeled Data using the Area Under the Margin Ranking},
  author={Pleiss, Geoff and Zhang, Tianyi and Elenberg, Ethan R. and Weinberger, Kilian Q.},
  booktitle={Advances in Neural Information Processing Systems},
  year={2020}
}""",
    "arXiv:2009.10795": """@inproceedings{swayamdipta2020dataset,
  title={Dataset Cartography: Mapping and Diagnosing Datasets with Training Dynamics},
  author={Swayamdipta, Swabha and Schwartz, Roy and Lourie, Nicholas and Wang, Yizhong and others},
  booktitle={Conference on Empirical Methods in Natural Language Processing},
  year={2020}
}""",
    "arXiv:1812.05159": """@inproceedings{toneva2019empirical,
  title={An Empirical Study of Example Forgetting during Deep Neural Network Learning},
  author={Toneva, Mariya and Sordoni, Alessandro and Tachet des Combes, Remi and others},
  booktitle={International Conference on Learning Representations},
  year={2019}
}""",
    "arXiv:1911.00068": """@article{northcutt2021confident,
  title={Confident Learning: Estimating Uncertainty in Dataset Labels},
  author={Northcutt, Curtis G. and Jiang, Lu and Chuang, Isaac L.},
  journal={Journal of Artificial Intelligence Research},
  volume={70},
  pages={1373--1411},
  year={2021}
}""",
    "arXiv:2207.03061": """@article{kuan2022back,
  title={Back to the Basics: Revisiting Out-of-Distribution Detection Baselines},
  author={Kuan, Johnson and Mueller, Jonas},
  journal={arXiv preprint arXiv:2207.03061},
  year={2022}
}""",
    "doi:10.1561/1500000019": """@article{robertson2009probabilistic,
  title={The Probabilistic Relevance Framework: {BM25} and Beyond},
  author={Robertson, Stephen and Zaragoza, Hugo},
  journal={Foundations and Trends in Information Retrieval},
  volume={3},
  number={4},
  pages={333--389},
  year={2009}
}""",
    "arXiv:2407.03618": """@article{lu2024bm25s,
  title={{BM25S}: Orders of magnitude faster lexical search via eager sparse scoring},
  author={L{\\`u}, Xing Han},
  journal={arXiv preprint arXiv:2407.03618},
  year={2024}
}""",
    "arXiv:2304.11153": """@inproceedings{vicol2023low,
  title={Low-Variance Gradient Estimation in Unrolled Computation Graphs with {ES-Single}},
  author={Vicol, Paul and Kolter, Zico and Swersky, Kevin},
  booktitle={International Conference on Machine Learning},
  year={2023}
}""",
    "arXiv:2112.13835": """@inproceedings{vicol2021unbiased,
  title={Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent Evolution Strategies},
  author={Vicol, Paul and Metz, Luke and Sohl-Dickstein, Jascha},
  booktitle={International Conference on Machine Learning},
  year={2021}
}""",
    "arXiv:2212.14032": """@inproceedings{vicol2022implicit,
  title={On Implicit Bias in Overparameterized Bilevel Optimization},
  author={Vicol, Paul and Lorraine, Jonathan and Pedregosa, Fabian and Duvenaud, David and Grosse, Roger},
  booktitle={International Conference on Machine Learning},
  year={2022}
}""",
    "arXiv:1911.02590": """@inproceedings{lorraine2020optimizing,
  title={Optimizing Millions of Hyperparameters by Implicit Differentiation},
  author={Lorraine, Jonathan and Vicol, Paul and Duvenaud, David},
  booktitle={International Conference on Artificial Intelligence and Statistics},
  year={2020}
}""",
    "arXiv:1502.03492": """@inproceedings{maclaurin2015gradient,
  title={Gradient-based Hyperparameter Optimization through Reversible Learning},
  author={Maclaurin, Dougal and Duvenaud, David and Adams, Ryan P.},
  booktitle={International Conference on Machine Learning},
  year={2015}
}""",
    "arXiv:1803.09050": """@inproceedings{ren2018learning,
  title={Learning to Reweight Examples for Robust Deep Learning},
  author={Ren, Mengye and Zeng, Wenyuan and Yang, Bin and Urtasun, Raquel},
  booktitle={International Conference on Machine Learning},
  year={2018}
}""",
    "arXiv:1811.10959": """@article{wang2018dataset,
  title={Dataset Distillation},
  author={Wang, Tongzhou and Zhu, Jun-Yan and Torralba, Antonio and Efros, Alexei A.},
  journal={arXiv preprint arXiv:1811.10959},
  year={2018}
}""",
    "arXiv:2409.13990": """@article{lee2024batch,
  title={Batch Predictive Inference},
  author={Lee, Yonghoon and Tchetgen Tchetgen, Eric and Dobriban, Edgar},
  journal={arXiv preprint arXiv:2409.13990},
  year={2024}
}""",
    "arXiv:2310.18108": """@inproceedings{gazin2024transductive,
  title={Transductive Conformal Inference with Adaptive Scores},
  author={Gazin, Ulysse and Blanchard, Gilles and Roquain, Etienne},
  booktitle={International Conference on Artificial Intelligence and Statistics},
  year={2024}
}""",
    "arXiv:1703.02307": """@article{blanchard2020post,
  title={Post Hoc Confidence Bounds on False Positives Using Reference Families},
  author={Blanchard, Gilles and Neuvial, Pierre and Roquain, Etienne},
  journal={Annals of Statistics},
  volume={48},
  number={3},
  pages={1281--1303},
  year={2020}
}""",
    "arXiv:2510.24256": """@article{merullo2025memorization,
  title={From Memorization to Reasoning in the Spectrum of Loss Curvature},
  author={Merullo, Jack and Vatsavaya, Srihita and Bushnaq, Lucius and Lewis, Owen},
  journal={arXiv preprint arXiv:2510.24256},
  year={2025}
}""",
    "arXiv:2410.02159": """@article{sakarvadia2024mitigating,
  title={Mitigating Memorization in Language Models},
  author={Sakarvadia, Mansi and Ajith, Aswathy and Khan, Arham and Hudson, Nathaniel and others},
  journal={arXiv preprint arXiv:2410.02159},
  year={2024}
}""",
    "doi:10.1007/BF02288367": """@article{eckart1936approximation,
  title={The Approximation of One Matrix by Another of Lower Rank},
  author={Eckart, Carl and Young, Gale},
  journal={Psychometrika},
  volume={1},
  number={3},
  pages={211--218},
  year={1936}
}""",
    "arXiv:2405.10927": """@article{bushnaq2024degeneracy,
  title={Using Degeneracy in the Loss Landscape for Mechanistic Interpretability},
  author={Bushnaq, Lucius and Mendel, Jake and Heimersheim, Stefan and Braun, Dan and others},
  journal={arXiv preprint arXiv:2405.10927},
  year={2024}
}""",
    "arXiv:2405.10928": """@article{bushnaq2024local,
  title={The Local Interaction Basis: Identifying Computationally-Relevant and Sparsely Interacting Features in
         Neural Networks},
  author={Bushnaq, Lucius and Heimersheim, Stefan and Goldowsky-Dill, Nicholas and Braun, Dan and others},
  journal={arXiv preprint arXiv:2405.10928},
  year={2024}
}""",
    "arXiv:1810.08473": """@article{traag2019leiden,
  title={From {L}ouvain to {L}eiden: Guaranteeing Well-Connected Communities},
  author={Traag, Vincent A. and Waltman, Ludo and van Eck, Nees Jan},
  journal={Scientific Reports},
  volume={9},
  year={2019}
}""",
    "arXiv:2308.12108": """@article{lau2023quantifying,
  title={The Local Learning Coefficient: A Singularity-Aware Complexity Measure},
  author={Lau, Edmund and Furman, Zach and Wang, George and Murfet, Daniel and Wei, Susan},
  journal={arXiv preprint arXiv:2308.12108},
  year={2023}
}""",
    "doi:10.1162/neco.1992.4.3.415": """@article{mackay1992bayesian,
  title={Bayesian Interpolation},
  author={MacKay, David J. C.},
  journal={Neural Computation},
  volume={4},
  number={3},
  pages={415--447},
  year={1992}
}""",
    "arXiv:2008.03703": """@inproceedings{feldman2020what,
  title={What Neural Networks Memorize and Why: Discovering the Long Tail via Influence Estimation},
  author={Feldman, Vitaly and Zhang, Chiyuan},
  booktitle={Advances in Neural Information Processing Systems},
  year={2020}
}""",
    "arXiv:2308.12032": """@inproceedings{li2024quantity,
  title={From Quantity to Quality: Boosting {LLM} Performance with Self-Guided Data Selection for Instruction Tuning},
  author={Li, Ming and Zhang, Yong and Li, Zhitao and Chen, Jiuhai and Chen, Lichang and Cheng, Ning and others},
  booktitle={North American Chapter of the Association for Computational Linguistics},
  year={2024}
}""",
    "arXiv:2406.02745": """@inproceedings{ng2024measuring,
  title={Measuring Stochastic Data Complexity with {Boltzmann} Influence Functions},
  author={Ng, Nathan and Grosse, Roger and Ghassemi, Marzyeh},
  booktitle={International Conference on Machine Learning},
  year={2024}
}""",
    "arXiv:1706.04599": """@inproceedings{guo2017calibration,
  title={On Calibration of Modern Neural Networks},
  author={Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle={International Conference on Machine Learning},
  year={2017}
}""",
    "arXiv:2106.14806": """@inproceedings{daxberger2021laplace,
  title={Laplace Redux: Effortless {Bayesian} Deep Learning},
  author={Daxberger, Erik and Kristiadi, Agustinus and Immer, Alexander and others},
  booktitle={Advances in Neural Information Processing Systems},
  year={2021}
}""",
    "arXiv:2110.09246": """@inproceedings{bibas2021single,
  title={Single Layer Predictive Normalized Maximum Likelihood for Out-of-Distribution Detection},
  author={Bibas, Koby and Feder, Meir and Hassner, Tal},
  booktitle={Advances in Neural Information Processing Systems},
  year={2021}
}""",
}

_OF_CURVATURE = {
    "kfac": ["arXiv:1503.05671"],
    "ekfac": ["arXiv:1806.03884", "arXiv:1503.05671"],
    "dual": ["arXiv:1906.02353"],
}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return dict(_versions())


@cache  # reading package metadata takes as long as a small fit
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("headwater", "torch", "numpy", "transformers", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def papers(facts: dict[str, Any]) -> list[str]:
    """The papers behind a result, from its facts: the method's, the curvature's and the damping's."""
    found = list(facts.get("papers", []))
    found += _OF_CURVATURE.get(facts.get("curvature", {}).get("kind", ""), [])
    if "evidence" in facts.get("damping", {}).get("source", ""):
        found.append("doi:10.1162/neco.1992.4.3.415")
    return list(dict.fromkeys(found))


def cite(result: Any) -> str:
    """BibTeX entries for what a result was made with.

    Args:
        result: Anything with `facts` (scores, evidence), or the facts themselves.

    Example:
        >>> print(cite({"papers": ["arXiv:1703.04730"]}).splitlines()[0])
        @inproceedings{koh2017understanding,
    """
    facts = result if isinstance(result, dict) else result.facts
    return "\n\n".join(PAPERS[p] for p in papers(facts) if p in PAPERS)
