"""The trainer: DLRM and DCN-v2 for clicks, two towers for retrieval, on tables of events.

The rooms, in reading order (a module imports the ones above it only):

  errors           the one exception the command line turns into a sentence
  data/criteo      the names of the Criteo format
  data/schema      what the columns of the data are used as
  data/block       rows on the host
  data/processes   what several processes do together
  options          what an option is: its type, help and bounds
  tower_settings   the options of retrieval with two towers
  data_settings    the options of the data
  dynamic_settings  the options of tables that grow
  column_settings  the options that may differ from column to column
  settings         every option of a run
  plan_settings    the options of a plan
  compare_settings  the options of a comparison
  config_file      defaults, configuration file and command line -> settings
  data/cells       arrow columns of text or numbers -> arrays, and the cells that cannot be read
  data/lists       arrow columns of lists, or of text that is cut into them -> keys and offsets
  data/decode      arrow tables -> blocks, and what is wrong with each bad row
  data/files       which files there are, whether they stay as they are, bad lines
  data/formats     how text is written: delimiter, header, quotation marks
  data/text        files of text -> tables, with bounded memory
  data/parquet     Parquet files -> tables, with bounded memory
  data/folders     columns that are in the names of folders
  data/numbering   the numbers of rows, in the order of the files or by time
  data/column_names  what the name of a column says of it
  data/looks       what the first rows say of a column
  data/labels      whether labels are clicks and what are none
  data/inference   what the columns of a table are used as
  data/sources     one file or many -> blocks, split by lines or by time
  data/synthetic   a click stream whose true click rates are known
  data/vocabulary  64-bit category keys -> ids
  data/counts      how often each key was met, and the ids of every column by that
  data/sizes       vocabulary sizes from a small file
  data/names       keys by their names in the data
  data/population  the ids of a column by how often they were met
  data/shares      what each of several processes reads
  data/catalogue   the rows that an item was wanted in, and the items of them
  data/pipeline    blocks -> batches of a fixed shape, prefetched in the background
  model/room       settings and the room there is -> tables that grow
  model/pools      columns of keys that share one set of tables
  model/columns    settings and vocabulary sizes -> one EmbedConfig for each column
  model/growing    the columns that share a table that grows
  model/planned    a plan for the columns -> settings that build its embeddings
  model/models     DLRM, DCN-v2
  model/towers     two towers: vectors of queries and of items
  model/softmax    the in-batch softmax, and how often an item comes into a batch
  model/losses     what a training makes less of
  model/metrics    log loss, AUC
  model/ranks      recall and mean reciprocal rank
  run/display      progress bars and plain lines
  run/devices      one device, a mesh of several, or several processes
  run/growth       what becomes of the keys of tables that grow
  run/stored       rows that are in a store, and those of them on the device
  run/optimizers   how the parameters of a model learn
  run/learner      parameters, their optimizer and the compiled step
  run/best         the best model of a run, and when to look no further
  run/progress     where a training stands
  run/retrieval    finding items
  run/goals        what a run is for: clicks or items
  run/rows         which rows are trained, validated and tested on
  run/records      what is kept of a run
  run/overview     the table of columns shown before training
  run/report       JSON lines, the picture, the final table
  run/train        the run from the first line to the last
  run/trained      the trained model of a run, and its data
  run/predict      the scores that a trained model gives to new rows
  run/export_inputs  what an exported model takes and gives
  run/export_formats  the exported function in the formats of other systems
  run/export_readme  the page that an exported model comes with
  run/exported     a trained model as files that run without qrhash
  run/plan_report  a plan as a table and as a picture
  run/plan         from data to a plan, and to the file that a run begins with
  run/compare      the same training with other embeddings, sizes and seeds
  run/compare_report  a comparison as a table, a picture and figures
  run/again        the data of a run, read once more
  run/by_frequency  how good a model is for ids that are met often, or seldom
  run/inspected    what became of the embeddings of a run
  run/inspect      the same, found out
  run/inspect_figures  the same as JSON
  run/inspect_picture  the same as a picture
  run/inspect_report   the same as tables
"""
