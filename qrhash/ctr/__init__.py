"""The click-through-rate trainer: DLRM and DCN-v2 on Criteo-format data.

The rooms, in reading order (a module imports the ones above it only):

  errors      the one exception the command line turns into a sentence
  settings    every option of a run, and the configuration file
  display     progress bars and plain lines
  devices     one device, a mesh of several, or several processes
  block       rows on the host, and the columns of the format
  cells       arrow columns of text or numbers -> a block, and what is wrong with each bad row
  sources     text, gzip and Parquet files -> blocks, with bounded memory
  synthetic   a click stream whose true click rates are known
  vocabulary  64-bit category keys -> ids
  columns     settings and vocabulary sizes -> one EmbedConfig for each column
  pipeline    blocks -> batches of a fixed shape, prefetched in the background
  models      DLRM, DCN-v2
  metrics     log loss, AUC
  progress    where a training stands
  learner     parameters, optimizers and the compiled step
  report      JSON lines, the picture, the final table
  train       the run from the first line to the last
"""
