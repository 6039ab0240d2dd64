"""Every configuration value with its default: the one place to read what can be set.

`default_config("mars")` is what works and the default; `default_config("paper")` is MARS as printed. Files under
configs/ start from one of them and override what differs.
"""

from __future__ import annotations

import inspect

from ml_collections import ConfigDict, config_dict

from marsjax.data.synthetic import make_synthetic


def default_config(preset: str = "mars") -> ConfigDict:
    """The complete configuration of a preset, "mars" or "paper"."""
    config = ConfigDict()
    config.seeds = (0,)  # one full run for each: alignment, augmentation and CTR

    config.data = data = ConfigDict()
    data.source = "synthetic"  # synthetic, movielens, tabular, amazon, microlens, mind
    data.folder = ""  # movielens: the official folder; mind: folders, joined by commas
    data.events_file = ""  # tabular: Parquet or CSV with one row an interaction; amazon: reviews; microlens: pairs
    # tabular: Parquet or CSV with one row an item; amazon: metadata; microlens: titles; "" takes items from the events
    data.items_file = ""
    data.text_features = ""  # .npz, .npy or Parquet with one vector an item; "" does without
    data.image_features = ""
    data.image_folder = ""  # images named by item id, checked for completeness and encoded; "" does without
    data.item_texts = ""  # movielens: JSON lines of movie_id and text, for features.template; "" does without
    data.permute_features = False  # a control: each item has the features of another one
    data.label_threshold = config_dict.placeholder(float)  # label = value >= threshold; None: the column is 0/1
    data.min_item_events = 1  # items with fewer events are dropped
    data.min_user_events = 1
    data.sample_users = 0  # only so many users, drawn with split.seed; 0: all
    data.permute_labels = ""  # a control: labels in random order, among those of the user (users) or of all (log)
    data.core = 0  # amazon: keep users and items with so many reviews each; 0: all
    data.negatives = 1  # microlens: videos without a click that are drawn for each click
    data.checksums = ""  # a list of sums as sha256sum writes it, which the files are checked against; "" checks none
    data.expected_events = 0  # published counts that all but movielens, which has its own, are checked against; 0: any
    data.expected_users = 0
    data.expected_items = 0
    data.strict = False  # refuse bad rows instead of dropping them
    data.columns = columns = ConfigDict()  # tabular: our name -> the file's name
    columns.user = "user"
    columns.item = "item"
    columns.label = "label"
    columns.time = "time"
    columns.title = ""  # of the items file; "" where there is none
    columns.categories = ""
    columns.image = ""  # file names in image_folder; "" finds images by item id
    data.category_separator = "|"
    data.synthetic = synthetic_config()

    config.features = features = ConfigDict()  # `marsjax features`, features/; data.text_features needs no encoder
    features.text = ""  # encoder of the texts: tfidf, minilm, llama, precomputed; "" encodes none
    features.image = ""  # encoder of the images: colour, mobilenet, qwen_vision, precomputed; "" encodes none
    features.template = "{title}"  # what of an item is encoded as its text: columns of the items, in braces
    features.dtype = "float32"  # of the vectors on disk: float32, float16
    features.text_model = ""  # llama: a folder or hub name; minilm: a folder instead of the packaged weights
    features.text_revision = ""  # of a hub name: a commit, so that the weights stay the same
    features.text_file = ""  # precomputed: .npz, .npy or Parquet
    features.text_width = 256  # tfidf: singular vectors; others have their own width
    features.text_expected = 4096  # llama: refuse a model of another width; 0 takes any
    features.max_tokens = 0  # longer texts are cut; 0: as the model was trained
    features.image_model = ""  # qwen_vision: a folder or hub name; mobilenet: a file instead of the packaged weights
    features.image_revision = ""
    features.image_file = ""  # precomputed
    features.image_expected = 3584  # qwen_vision: as above
    features.batch = 0  # items encoded at a time; 0: as the encoder likes it

    config.split = split = ConfigDict()
    split.kind = "leave_one_out"  # leave_one_out, last_fraction, global_time
    split.fraction_test = 0.2
    split.fraction_valid = 0.1
    split.low_fraction = 0.3  # the bottom 30% of users by training events are low-active (section 4.1.3)
    split.high_fraction = 0.3  # the top 30% are high-active, and the only donors
    split.history = "all"  # what a history holds: all events, or positives only
    split.sparse_fraction = 0.0  # share of the users whose histories are cut short, to learn what borrowing is worth
    split.sparse_events = 5  # what they keep; they are then the low-active users
    split.seed = 0  # breaks ties of activity, and draws the sparse users

    config.alignment = alignment = ConfigDict()
    alignment.modalities = ("text", "image")  # keys and values of Eq. 9, then its queries; (), one or two
    alignment.id_width = 128
    alignment.width = 256
    alignment.hidden = 128  # of the FFN of Eq. 12; the paper gives none
    alignment.beta = 0.1  # Eq. 14; the paper gives none
    alignment.lambda_ = (
        0.003  # Eq. 8; the surrogate grows with the width: 0.1 at 8 (where it was studied) is 0.003 at 256
    )
    alignment.objective = "stein"  # draws text and image of an item together, Eq. 8: stein, info_nce, cosine, mmd
    alignment.eta = 0.1  # ridge of the score estimator: the best compromise over D = 2..256
    alignment.estimator = "stein"  # stein, ssge
    alignment.normalise = True  # unnormalised vectors have unbounded entropy
    alignment.residual = True  # Eq. 11 has no residual: text and image would only weigh ids
    alignment.keep_values = False  # start W_V of Eq. 9 at the identity: a random one tears apart what Eq. 5 aligned
    alignment.entropy_sign = "dispersive"  # dispersive spreads the space; printed contracts it (Eqs. 7-8)
    alignment.epochs = 1.0  # over all training events
    alignment.blocks = 64  # histories a batch
    alignment.targets = 16  # targets that share a history
    alignment.history = 50  # the last items of a history that are encoded in training
    alignment.stein_items = 512  # distinct items the Stein loss is computed over; the paper's batch
    alignment.learning_rate = 1e-3
    alignment.weight_decay = 1e-2
    alignment.clip = 1.0  # global gradient norm

    config.retrieval = retrieval = ConfigDict()
    retrieval.backend = "usearch"  # usearch, exact
    retrieval.donors = 5  # nearest high-active users a query gets; strategies of one donor use the first
    retrieval.history = 200  # the last items a user is known by: its vector is their mean
    retrieval.centre = True  # subtract the donors' mean: mean-pooled vectors share a large common part
    retrieval.prefix_stride = 4  # donors of a training row from the prefix before it; 0: the whole history (leaks)

    config.augmentation = augmentation = ConfigDict()
    augmentation.strategy = "filter"  # most_similar, filter, kth_similar, dp (section 4.4)
    augmentation.theta = config_dict.placeholder(float)  # Eq. 17 as a value (then theta_quantile=none)
    augmentation.theta_quantile = config_dict.placeholder(float)  # Eq. 17 as a quantile of the donor's items, or none
    augmentation.theta_quantile = 0.5  # the paper gives no theta
    augmentation.vectors = "contextual"  # item vectors of Eq. 16 in the donor's history, or static ones
    augmentation.time_safe = False  # borrow nothing that the donor met after the target
    augmentation.drop_target = False  # never borrow the target itself

    config.votes = votes = ConfigDict()  # of the donors on the target, augmentation/votes.py
    votes.sharpness = 8.0  # a donor counts exp(sharpness * cosine)
    votes.evidence = 20.0  # events with which half the sharpness is reached
    votes.shrink = 30.0  # donors of average weight who say "as usual"
    votes.low_only = False  # ask for low-active users alone, not for all who are no donors

    config.posterior = posterior = ConfigDict()  # of a user's opinion on the target, augmentation/posterior.py
    posterior.components = 32  # of the covariance between items
    posterior.folds = 5  # users are dealt into so many, and a row asks the donors of the other ones

    config.short = short = ConfigDict()  # of the method short_histories, and of those that build on it
    short.share = 0.5  # training rows of other users that are shown with a history as short as a low-active user's

    config.baselines = baselines = ConfigDict()  # the methods of other papers, augmentation/baselines.py
    baselines.mode = "paper"  # paper, as_released (with the faults of the released code)
    baselines.view_length = 50  # the last own entries that views are made of: the longest history of the sources

    config.ctr = ctr = ConfigDict()
    ctr.backbone = "din"  # din, dnn
    ctr.inputs = "ids"  # ids (and categories; the paper), strong: also content, liked items, rates; graded: grades too
    ctr.rate_folds = 5  # strong: an item's rate of likes is that of the users of the other folds
    ctr.components = 64  # strong: principal components of the items' text and image features
    ctr.content = 10  # strong: width they are projected to
    ctr.embedding = 10
    ctr.attention = (32,)
    ctr.tower = (200, 80)
    ctr.softmax = True  # of DIN's attention over the history
    ctr.apart = False  # pool borrowed items apart from own ones; Eq. 18 makes one sequence of both
    ctr.activation = "prelu"  # prelu, dice
    ctr.dtype = "float32"  # what the model computes in: float32, bfloat16; parameters and the loss are float32
    ctr.user_id = True  # an embedding of the user's id beside the history
    # A step goes through all rows of users and items (dense), or through those that its batch names (lazy, many times
    # as fast with a million of them), of which each device may also hold a part (sharded, needs shard_map).
    ctr.tables = "dense"
    ctr.cap = 200  # longest history; own events survive
    ctr.buckets = (25, 50, 100, 200)  # history lengths that are compiled
    ctr.batch_size = 512
    ctr.epochs = 3
    ctr.evaluations_per_epoch = 1
    ctr.learning_rate = 1e-3
    ctr.weight_decay = 0.0
    ctr.id_decay = 0.0  # weight decay of the embeddings of ids alone, as those of few events overfit; 1 to 4 on ML-1M
    ctr.clip = 10.0
    ctr.patience = 1  # evaluations without a better validation AUC before training stops
    ctr.plateau_factor = 1.0  # learning rate factor after such an evaluation; 1 is off

    config.training = training = ConfigDict()
    training.sharding = "pmap"  # pmap, shard_map, single
    training.checkpoint_seconds = 30.0
    training.log_steps = 50

    config.evaluation = evaluation = ConfigDict()
    evaluation.methods = (  # each is trained on its own; see augmentation/methods.py
        "base",
        "random_donor",
        "popular_items",
        "mars",
        "mars_time_safe",
        "mars_without_target",
    )
    evaluation.bootstrap = 1000  # resamples of the users

    config.export = export = ConfigDict()
    # Of the methods that read no grades, the best on low-active users' validation rows of MovieLens-1M, ids alone.
    export.method = "mars_posterior"  # what `marsjax export` bundles

    config.serving = serving = ConfigDict()  # of `marsjax serve` and `marsjax runner`
    serving.host = "127.0.0.1"  # another address needs MARSJAX_EVENTS_TOKEN and MARSJAX_ADMIN_TOKEN in the environment
    serving.port = 8080
    serving.storage = ""  # stream and store: sqlite:PATH or redis://HOST:PORT/DB; "" is sqlite:ROOT/storage.sqlite
    serving.ttl_days = 30.0  # Redis: values live so long after they were written; longer than bundles are apart
    serving.deadline_ms = 50.0  # after so long nothing is looked up any more, and the score is the unaugmented one
    serving.store_deadline_ms = 20.0  # the store has so long to answer a request
    serving.poll_seconds = 0.5  # between two looks for another version
    serving.most_candidates = 1000  # of a request
    serving.most_bytes = 1 << 20  # of a request
    serving.rate = 1000.0  # requests a second of one client
    serving.image_folder = ""  # pictures for /explain, named by item id
    serving.augment = True  # off: scores without what is borrowed, to measure what it costs
    serving.live = False  # look up anew also what the bundle has an answer for, to measure what that costs
    serving.cache = True  # remember what users borrow
    serving.keep = 5  # published versions
    serving.batch = 1000  # runner: events, and users, at a time
    serving.lenders_seconds = 300.0  # runner: between two indexes of donors; 0 builds none
    serving.index_threads = 1  # runner: threads that build it; 0: one a processor, beside the service if it is there
    serving.rebuild_hour = 3  # runner: hour of the day after which all is made anew; -1: never
    serving.shards = 16  # rebuild: files that the users are split into
    serving.workers = 0  # rebuild: processes on Ray Data; 0: this one alone
    serving.train_seconds = 1200.0  # runner: between two continuations of the training; 0: none
    serving.train_events = 500  # runner: fewer new events wait for the next time
    serving.train_rate = 0.1  # runner: of the learning rate that the model was trained with
    serving.margin = 0.002  # runner: log loss by which a candidate may be worse than what is served

    if preset == "paper":
        alignment.normalise = False  # nothing in Eqs. 3-8 normalises
        alignment.residual = False  # Eq. 11 as printed
        alignment.entropy_sign = "printed"  # Eqs. 7-8 as printed
        alignment.blocks = 512  # section 4.1.3
        alignment.targets = 1
        retrieval.centre = False  # Eq. 15 as printed
        retrieval.prefix_stride = 0  # Eq. 15 with all that is known of the user
        export.method = "mars"  # Eqs. 15-18
    elif preset != "mars":
        raise ValueError(f"preset: expected 'mars' or 'paper', found {preset!r}")
    return config.lock()


def synthetic_config() -> ConfigDict:
    """The named arguments of `marsjax.data.synthetic.make_synthetic`."""
    parameters = inspect.signature(make_synthetic).parameters
    named = {name: parameter for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}
    return ConfigDict({name: parameter.default for name, parameter in named.items()})
