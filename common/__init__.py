from common.stopping import end_imports

end_imports()
